//! What the figures depend on: processors, memory, kernel, the file system of the registries. Nothing that names the
//! machine or who uses it.

use std::path::Path;

use anyhow::{Context, Result};

/// The version of the registries, as testenv/go/registries/go.mod pins it.
pub(crate) const DISTRIBUTION: &str = "3.1.2";

/// The facts in one line; storage is where `run_dir` is.
pub(crate) fn facts(run_dir: &Path) -> Result<String> {
    let processors = std::thread::available_parallelism()?;
    let memory = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let memory = gibibytes(&memory).context("/proc/meminfo does not say how much memory there is")?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's version")?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let storage = file_system(&mounts, run_dir).unwrap_or("an unknown file system");
    // What follows the numbers may name who built it.
    let kernel = kernel.split(['-', '+']).next().unwrap_or_default().trim();
    Ok(format!("{processors} processors, {memory} GiB, Linux {kernel}, the registries' storage on {storage}"))
}

fn gibibytes(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = total.split_whitespace().next()?.parse().ok()?;
    Some((kibibytes + (1 << 19)) >> 20)
}

/// The type of the file system that `path` is on: of the longest mount point above it.
fn file_system<'a>(mounts: &'a str, path: &Path) -> Option<&'a str> {
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let above = mounts.filter(|(point, _)| path.starts_with(point));
    above.max_by_key(|(point, _)| point.len()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_is_that_of_the_nearest_mount_point() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /dev tmpfs rw 0 0\nshm /dev/shm shmfs rw 0 0\n";
        assert_eq!(file_system(mounts, Path::new("/dev/shm/run")), Some("shmfs"));
        assert_eq!(file_system(mounts, Path::new("/tmp/run")), Some("ext4"));
    }

    #[test]
    fn memory_is_rounded() {
        assert_eq!(gibibytes("MemTotal:       24683632 kB\nMemFree: 1 kB\n"), Some(24));
    }

    #[test]
    fn the_version_of_the_registries_is_the_one_that_is_built() {
        let pins = include_str!("../../testenv/go/registries/go.mod");
        assert!(pins.contains(&format!("github.com/distribution/distribution/v3 v{DISTRIBUTION}\n")));
    }
}
