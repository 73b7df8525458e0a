//! The unix sockets on which a test talks to a QEMU that it starts.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::process::Proc;

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// QEMU's argument for a chardev that connects to the socket `path`.
pub(crate) fn socket(id: &str, path: &Path) -> String {
    format!("socket,id={id},path={}", path.display())
}

/// Listens on `path`. The test listens and QEMU connects, so that no output of the boot is lost.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    // An earlier machine of this name may have left its socket.
    _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)
        .with_context(|| format!("the socket {} cannot be created", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Waits until the program `proc` has connected.
pub(crate) fn accept(listener: &UnixListener, proc: &mut Proc) -> Result<UnixStream> {
    let until = Instant::now() + START_TIMEOUT;
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false)?;
            return Ok(stream);
        }
        proc.check_alive()?;
        anyhow::ensure!(
            Instant::now() < until,
            "QEMU did not connect within {START_TIMEOUT:?}; its stderr: {}",
            proc.stderr().trim()
        );
        sleep(Duration::from_millis(5));
    }
}
