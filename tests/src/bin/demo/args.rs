//! The demo's command line.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use virtionet_tests::accel::Accel;

/// What `--help` prints.
pub const HELP: &str = "\
Runs iperf3 between this machine and a QEMU guest through virtionetd, in both
directions, and prints how much traffic each worker carried and on which CPU.

Usage: ci/demo [--seconds N] [--queues N] [--vcpus N] [--accel tcg|kvm|auto] [--json FILE]

  --seconds N   Seconds for which each direction runs [default: 10]
  --queues N    Number of queue pairs, 1 to 64 [default: 4]
  --vcpus N     Number of vCPUs of the guest [default: 4, or as many as queue
                pairs if these are more]
  --accel NAME  Accelerator of QEMU: tcg (software), kvm, or auto, which uses
                kvm if the guest boots under it [default: auto]
  --json FILE   Write the result to FILE as JSON too
";

/// The parsed command line, in which missing options have their defaults.
#[derive(Debug, PartialEq, Eq)]
pub struct Args {
    /// The duration of each direction in seconds.
    pub seconds: u32,
    /// The number of queue pairs.
    pub queues: u16,
    /// The number of vCPUs of the guest.
    pub vcpus: u16,
    /// The accelerator of QEMU.
    pub accel: Accel,
    /// The file for the result as JSON.
    pub json: Option<PathBuf>,
}

impl Args {
    /// Parses the command line. Returns `None` if it asks for help.
    ///
    /// # Errors
    /// When an option is unknown, or its value is missing or invalid.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let mut args = Self {
            seconds: 10,
            queues: 4,
            vcpus: 0,
            accel: Accel::Auto,
            json: None,
        };
        while let Some(word) = words.next() {
            if word == "--help" || word == "-h" {
                return Ok(None);
            }
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word, words.next()),
            };
            args.set(&name, value.as_deref())?;
        }
        if args.vcpus == 0 {
            args.vcpus = args.queues.max(4);
        }
        ensure!(
            args.seconds > 0,
            "--seconds 0 measures nothing: write 1 or more"
        );
        Ok(Some(args))
    }

    fn set(&mut self, name: &str, value: Option<&str>) -> Result<()> {
        let required = || value.with_context(|| format!("{name} needs a value: see --help"));
        match name {
            "--seconds" => self.seconds = parse_number(name, required()?, 3600)?,
            "--queues" => self.queues = parse_number(name, required()?, 64)?,
            "--vcpus" => self.vcpus = parse_number(name, required()?, 64)?,
            "--accel" => self.accel = required()?.parse()?,
            "--json" => self.json = Some(required()?.into()),
            other => bail!("there is no option '{other}': see --help"),
        }
        Ok(())
    }
}

/// Parses a number from 1 to `max`.
fn parse_number<N: TryFrom<u32>>(name: &str, text: &str, max: u32) -> Result<N> {
    text.parse::<u32>()
        .ok()
        .filter(|n| (1..=max).contains(n))
        .and_then(|n| N::try_from(n).ok())
        .with_context(|| format!("{name} is '{text}': write a number from 1 to {max}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Args>> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn missing_options_have_defaults_and_vcpus_depend_on_queues() {
        let defaults = parse("").unwrap().unwrap();
        assert_eq!(
            (defaults.seconds, defaults.queues, defaults.vcpus),
            (10, 4, 4)
        );
        assert_eq!(parse("--queues 2").unwrap().unwrap().vcpus, 4);
        assert_eq!(parse("--queues=8").unwrap().unwrap().vcpus, 8);
        let args = parse("--vcpus 2 --accel tcg --json x").unwrap().unwrap();
        assert_eq!((args.vcpus, args.accel), (2, Accel::Tcg));
        assert_eq!(args.json.unwrap().to_str(), Some("x"));
        assert_eq!(parse("--seconds 3 --help").unwrap(), None);
    }

    #[test]
    fn unknown_option_or_invalid_value_is_an_error() {
        for line in [
            "--queues 0",
            "--queues 65",
            "--queues",
            "--seconds x",
            "--accel hvf",
            "--fast 1",
            "fast",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
