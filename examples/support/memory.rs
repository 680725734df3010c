//! How much memory the process has taken at most, and how much it may still take. Linux tells it.

/// The peak of the resident memory in bytes, where the system tells it (Linux).
pub fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// A line of the process's status, in bytes.
pub fn status(name: &str) -> Option<u64> {
    line("/proc/self/status", name)
}

/// A line in kB of one of the system's tables, in bytes.
fn line(table: &str, name: &str) -> Option<u64> {
    let table = std::fs::read_to_string(table).ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

/// The memory in bytes that can still be had at most: what the system has left, or the limit of a
/// container, whose page cache would go when asked.
pub fn available_bytes() -> Option<u64> {
    let left = line("/proc/meminfo", "MemAvailable:")?;
    let limits = ["memory.max", "memory/memory.limit_in_bytes"].map(|name| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    });
    limits.into_iter().flatten().chain([left]).min()
}
