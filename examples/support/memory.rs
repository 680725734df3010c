//! How much memory the process has taken at most.

/// The peak of the resident memory in bytes, where the system tells it (Linux).
pub fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// A line of the process's status, in bytes.
pub fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}
