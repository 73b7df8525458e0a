//! The demo's command line.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use virtionet_tests::accel::Accel;

/// What `--help` prints.
pub const HELP: &str = "\
Runs iperf3 between this machine and a QEMU guest through virtionetd, both ways,
and shows which worker on which CPU carried how much of the traffic.

Usage: ci/demo [--seconds N] [--queues N] [--vcpus N] [--accel tcg|kvm|auto] [--json FILE]

  --seconds N   How long each direction runs [default: 10]
  --queues N    Queue pairs, 1 to 64 [default: 4]
  --vcpus N     The guest's vCPUs [default: 4, or as many as queue pairs]
  --accel WHAT  How QEMU runs the guest: tcg (software), kvm, or auto, which
                takes kvm where the guest boots under it [default: auto]
  --json FILE   Write the result to FILE as JSON too
";

/// The command line, with its defaults filled in.
#[derive(Debug, PartialEq, Eq)]
pub struct Args {
    /// Seconds of each direction.
    pub seconds: u32,
    /// Queue pairs.
    pub queues: u16,
    /// The guest's vCPUs.
    pub vcpus: u16,
    /// How QEMU runs the guest.
    pub accel: Accel,
    /// Where the result goes as JSON.
    pub json: Option<PathBuf>,
}

impl Args {
    /// Reads the command line; `None` when only help is wanted.
    ///
    /// # Errors
    /// When an option is unknown, or its value cannot be used.
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
            "--seconds 0 measures nothing: give 1 or more"
        );
        Ok(Some(args))
    }

    fn set(&mut self, name: &str, value: Option<&str>) -> Result<()> {
        let given = || value.with_context(|| format!("{name} needs a value: see --help"));
        match name {
            "--seconds" => self.seconds = number(name, given()?, 3600)?,
            "--queues" => self.queues = number(name, given()?, 64)?,
            "--vcpus" => self.vcpus = number(name, given()?, 64)?,
            "--accel" => self.accel = given()?.parse()?,
            "--json" => self.json = Some(given()?.into()),
            other => bail!("there is no option '{other}': see --help"),
        }
        Ok(())
    }
}

/// A number from 1 to `most`.
fn number<N: TryFrom<u32>>(name: &str, text: &str, most: u32) -> Result<N> {
    text.parse::<u32>()
        .ok()
        .filter(|n| (1..=most).contains(n))
        .and_then(|n| N::try_from(n).ok())
        .with_context(|| format!("{name} is '{text}': give a number from 1 to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Args>> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn defaults_follow_the_queues() {
        let plain = parse("").unwrap().unwrap();
        assert_eq!((plain.seconds, plain.queues, plain.vcpus), (10, 4, 4));
        assert_eq!(parse("--queues 2").unwrap().unwrap().vcpus, 4);
        assert_eq!(parse("--queues=8").unwrap().unwrap().vcpus, 8);
        let own = parse("--vcpus 2 --accel tcg --json x").unwrap().unwrap();
        assert_eq!((own.vcpus, own.accel), (2, Accel::Tcg));
        assert_eq!(own.json.unwrap().to_str(), Some("x"));
        assert_eq!(parse("--seconds 3 --help").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for bad in [
            "--queues 0",
            "--queues 65",
            "--queues",
            "--seconds x",
            "--accel hvf",
            "--fast 1",
            "fast",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
