//! Memory of this process and its time on cores, as the system counts them. Knows nothing of what they are for.

/// About what the program itself has in memory.
const PROGRAM_BYTES: u64 = 32 << 20;

/// Highest resident memory of this process so far, in bytes; 0 where the system does not say. On Linux not from
/// `getrusage`, whose peak begins at that of the process that started this one.
pub fn peak_rss_bytes() -> u64 {
    if let Some(peak) = process_status().and_then(|status| status.bytes("VmHWM:")) {
        return peak;
    }
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    u64::try_from(usage().ru_maxrss).unwrap_or(0) * unit
}

/// Memory of the machine and how much of it is available, in bytes, where the system says.
pub fn machine_memory() -> Option<(u64, u64)> {
    let facts = Facts(fs_err::read_to_string("/proc/meminfo").ok()?);
    Some((facts.bytes("MemTotal:")?, facts.bytes("MemAvailable:")?))
}

/// Time that all threads of this process have spent on cores so far, in seconds.
pub fn cpu_seconds() -> f64 {
    let usage = usage();
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn usage() -> libc::rusage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `getrusage` writes one `rusage` to the pointer, which is valid for it; all zeroes is a valid value.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    }
}

/// Resident memory of this process now, in bytes, less what is there of `mapped` bytes of weights; the peak so far
/// where the system does not say.
pub(crate) fn memory_before(mapped: u64) -> u64 {
    let Some(status) = process_status() else { return peak_rss_bytes() };
    let bytes = |field| status.bytes(field).unwrap_or(0);
    // Touched pages of the weights are among the files' pages; the program's own are few.
    let files = bytes("RssFile:").min(if mapped > 0 { PROGRAM_BYTES } else { u64::MAX });
    bytes("RssAnon:") + files + bytes("RssShmem:")
}

/// What Linux says of this process, or of the machine.
struct Facts(String);

fn process_status() -> Option<Facts> {
    fs_err::read_to_string("/proc/self/status").ok().map(Facts)
}

impl Facts {
    /// The field of this name, `VmHWM:`, which Linux gives in kB of 1024 bytes.
    fn bytes(&self, field: &str) -> Option<u64> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_memory_grows_with_what_is_touched() {
        let before = peak_rss_bytes();
        let block = vec![1u8; 256 << 20];
        assert!(block.iter().map(|&byte| u64::from(byte)).sum::<u64>() == 256 << 20);
        assert!(peak_rss_bytes() >= before.max(256 << 20));
    }
}
