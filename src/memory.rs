//! How much memory there is to use.

use std::fs;

/// Memory that this process may have, in bytes: that of the machine or, when it is less, of the cgroup it runs in.
pub fn available() -> u64 {
    let machine = rustix::system::sysinfo();
    let machine = (machine.totalram as u64).saturating_mul(u64::from(machine.mem_unit));
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        .fold(machine, u64::min)
}

/// Gives memory for clusters, grains and frames back to the system as soon as it is free. Left to itself, glibc keeps
/// ever larger blocks for later in the heap of each thread, which doubles what a process that decodes needs.
pub fn return_large_blocks() {
    /// Blocks from this length on are mapped each for itself, such as those of decoded clusters.
    const LARGE: libc::c_int = 256 << 10;
    // SAFETY: sets a number of the allocator; called before there are other threads.
    #[allow(unsafe_code, reason = "glibc has no other way to say it")]
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}
