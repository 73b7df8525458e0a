//! Reading the small text files and the folders of procfs and sysfs.

use std::fs;
use std::io;
use std::path::Path;

use crate::cpuset::CpuSet;

/// The text of a file without its line end. Bytes that are not UTF-8, as a thread's name may
/// contain, are replaced.
pub(crate) fn read_text(file: &Path) -> io::Result<String> {
    let bytes = fs::read(file)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// The CPU list in a file; `None` where the file is missing or holds none.
pub(crate) fn read_cpulist(file: &Path) -> Option<CpuSet> {
    read_text(file).ok()?.parse().ok()
}

/// The names in a folder, sorted; empty where the folder cannot be read.
pub(crate) fn list_dir(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    names
}

/// The numbers N of the entries `prefixN` of a folder, in rising order; empty where the folder
/// cannot be read.
pub(crate) fn numbered_entries(dir: &Path, prefix: &str) -> Vec<u32> {
    let names = list_dir(dir);
    let mut numbers: Vec<u32> = names
        .iter()
        .filter_map(|name| name.strip_prefix(prefix)?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;

    #[test]
    fn texts_lists_and_names_are_read_and_missing_files_are_empty() {
        let dir = TempDir::new("kernel-files");
        for (file, bytes) in [
            ("cpu10", &b"0-3,8\n"[..]),
            ("cpu2", b"CPU \xff\n"),
            ("online", b""),
        ] {
            fs::write(dir.path().join(file), bytes).unwrap();
        }
        let at = |file: &str| dir.path().join(file);
        assert_eq!(read_text(&at("cpu2")).unwrap(), "CPU \u{fffd}");
        assert_eq!(read_cpulist(&at("cpu10")), Some("0-3,8".parse().unwrap()));
        assert_eq!(read_cpulist(&at("cpu2")), None);
        assert_eq!(read_cpulist(&at("absent")), None);
        assert_eq!(list_dir(dir.path()), ["cpu10", "cpu2", "online"]);
        assert_eq!(numbered_entries(dir.path(), "cpu"), [2, 10]);
        assert!(numbered_entries(&at("absent"), "cpu").is_empty());
    }
}
