//! How much memory there is to use.

use std::fs;
use std::path::{Component, Path};

/// Where Linux mounts its control groups.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Memory that this process may have, in bytes: that of the machine or, when it is less, of the cgroups it runs in.
pub fn available() -> u64 {
    let machine = rustix::system::sysinfo();
    let machine = (machine.totalram as u64).saturating_mul(u64::from(machine.mem_unit));
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limit_of(Path::new(CGROUPS), &own).map_or(machine, |limit| limit.min(machine))
}

/// The lowest limit of the cgroups of a process and of those above them, in bytes. `own` is `/proc/PID/cgroup`, with lines
/// `0::/PATH` (version 2) and `N:CONTROLLERS:/PATH` (version 1).
///
/// In a container the root of the mount is the container's own cgroup, whatever path `own` names: that is the last one looked at.
fn limit_of(cgroups: &Path, own: &str) -> Option<u64> {
    let mut limit = None;
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (root, file) = match controllers {
            "" => (cgroups.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                (cgroups.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        // A cgroup outside of this name space, which is not in this mount.
        let inside = path.components().all(|c| matches!(c, Component::Normal(_)));
        let path = if inside { path } else { Path::new("") };
        for group in path.ancestors() {
            let found = fs::read_to_string(root.join(group).join(file))
                .ok()
                .and_then(|text| text.trim().parse().ok());
            limit = limit.into_iter().chain(found).min();
        }
    }
    limit
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

/// Gives memory that is free back to the system, wherever it is. glibc keeps what lies between blocks in use, which after
/// thousands of connections is most of what they took. Takes milliseconds, and holds up whoever asks for memory meanwhile.
pub fn return_free_pages() {
    // SAFETY: takes no pointers, and may be called at any time by any thread.
    #[allow(unsafe_code, reason = "glibc has no other way to say it")]
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_of_the_own_cgroups() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let limit = |own: &str| limit_of(root.path(), own);
        assert_eq!(limit("0::/\n"), None);
        // A service of systemd with MemoryMax, in a slice without.
        write("system.slice/memory.max", "max\n");
        write("system.slice/serve.service/memory.max", "536870912\n");
        assert_eq!(limit("0::/system.slice/serve.service\n"), Some(512 << 20));
        assert_eq!(limit("0::/system.slice/other.service\n"), None);
        // A slice that allows less than the service.
        write("system.slice/memory.max", "1000\n");
        assert_eq!(limit("0::/system.slice/serve.service\n"), Some(1000));
        // A container that sees only its own cgroup, at the root of the mount.
        write("memory.max", "700\n");
        assert_eq!(limit("0::/../../pod/ctr\n"), Some(700));
        assert_eq!(limit("0::/not/in/this/mount\n"), Some(700));
        // Version 1, beside an empty hierarchy of version 2.
        write("memory/docker/abc/memory.limit_in_bytes", "300\n");
        assert_eq!(limit("0::/\n4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n"), Some(300));
        assert_eq!(limit("nonsense\n"), None);
    }
}
