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
