//! The messages of a migration by postcopy.

use std::fs::File;

use vhost::vhost_user::message::FrontendReq;

use super::{FrontendConnection, region_bytes};
use crate::error::Error;
use crate::memory::{GuestRam, to_u64};
use crate::message_stream::VHOST_USER_VERSION;

impl FrontendConnection {
    /// POSTCOPY_ADVISE. Returns the back-end's userfaultfd.
    ///
    /// # Errors
    /// When the connection fails or no descriptor comes with the reply.
    pub fn postcopy_advise(&mut self) -> Result<File, Error> {
        let code = FrontendReq::POSTCOPY_ADVISE.into();
        self.wire.send(code, VHOST_USER_VERSION, &[], &[])?;
        self.wire.reply_with_fd(code)
    }

    /// POSTCOPY_LISTEN.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn postcopy_listen(&mut self) -> Result<(), Error> {
        self.set(FrontendReq::POSTCOPY_LISTEN, &[], &[])
    }

    /// POSTCOPY_END, whose reply must be 0.
    ///
    /// # Errors
    /// When the connection fails or the back-end refuses.
    pub fn postcopy_end(&mut self) -> Result<(), Error> {
        match self.get_u64(FrontendReq::POSTCOPY_END)? {
            0 => Ok(()),
            code => Err(Error::Refused {
                request: FrontendReq::POSTCOPY_END.into(),
                code,
            }),
        }
    }

    /// SET_MEM_TABLE with all regions of `ram`, in a postcopy migration: without an acknowledgement of
    /// the answer. Returns the first address of each region in the back-end.
    ///
    /// # Errors
    /// When the connection fails or the answer is not the table.
    pub fn share_in_postcopy(&mut self, ram: &GuestRam) -> Result<Vec<u64>, Error> {
        let regions = ram.regions();
        let mut body = to_u64(regions.len()).to_ne_bytes().to_vec();
        body.extend(regions.iter().flat_map(region_bytes));
        let code = FrontendReq::SET_MEM_TABLE.into();
        let fds = vec![ram.fd(); regions.len()];
        self.wire.send(code, VHOST_USER_VERSION, &body, &fds)?;
        let answer = self.wire.reply(code)?;
        let (words, _) = answer.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        let addresses = regions
            .iter()
            .zip(words.get(1..).unwrap_or_default().chunks_exact(4));
        let addresses: Vec<u64> = addresses
            .filter(|(region, words)| region.guest_addr == words[0])
            .map(|(_, words)| words[2])
            .collect();
        match answer.len() == body.len() && addresses.len() == regions.len() {
            true => Ok(addresses),
            false => Err(Error::Reply {
                request: code,
                what: "it is not the table".into(),
            }),
        }
    }

    /// Acknowledges the addresses that [`Self::share_in_postcopy`] returned.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn acknowledge_memory(&mut self) -> Result<(), Error> {
        let code = FrontendReq::SET_MEM_TABLE.into();
        self.wire.send(code, VHOST_USER_VERSION, &[0; 8], &[])
    }
}
