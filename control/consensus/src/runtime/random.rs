//! Randomness for openraft (election timeouts), drawn from the executor's clock seam.

use cfs_reactor::Handle;
use std::convert::Infallible;

pub struct HandleRng {
    handle: Handle,
}

impl HandleRng {
    pub(super) fn new(handle: Handle) -> HandleRng {
        HandleRng { handle }
    }
}

impl rand::TryRng for HandleRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.handle.random_u64() as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.handle.random_u64())
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        for chunk in out.chunks_mut(8) {
            let word = self.handle.random_u64().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        Ok(())
    }
}
