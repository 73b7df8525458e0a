//! The unit file of the documentation.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// systemd's rating of what a service could reach, times 10: from 0, nothing, to 100.
const MAX_EXPOSURE: &str = "20";

#[test]
fn unit_exposes_little_of_the_host() {
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/systemd/virtionetd.service"
    );
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager"])
        .arg(format!("--threshold={MAX_EXPOSURE}"))
        .arg(unit)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("Overall exposure level"), "{text}{errors}");
    // A line that systemd does not understand would protect nothing.
    assert!(!errors.contains("ignoring"), "{errors}");
}
