//! Cutting the log at its old end.

use super::recovery::DELETES_AT_ONCE;
use super::{LogError, SharedLog};
use cfs_wire::ids::BlobId;
use cfs_wire::planted::{self, Bug};

impl SharedLog {
    /// Deletes the oldest batches that hold nothing alive, copying forward what little does
    /// live there. Answers how many batches went.
    ///
    /// The order keeps every crash harmless: what is copied or killed is durable, then a batch
    /// saying where the log begins is durable, then the blobs are deleted.
    pub async fn cut(&self) -> Result<usize, LogError> {
        self.cut_down(false).await
    }

    /// The same for a log that nobody appends to: copies forward what little lives also when the
    /// log is short.
    pub async fn cut_at_rest(&self) -> Result<usize, LogError> {
        self.cut_down(true).await
    }

    async fn cut_down(&self, resting: bool) -> Result<usize, LogError> {
        let mut undeleted = self.cutting.lock().await;
        self.delete(&mut undeleted).await?;
        let point = {
            let mut state = self.state.borrow_mut();
            // Copying forward has to pay: it happens only while the log is over half of what it
            // may take, or over what it may keep at rest.
            let worth = resting || state.stored > self.config.stored_bytes_max / 2;
            let point = state.cut_point(if worth { self.config.copy_bytes_max } else { 0 });
            if point == state.first {
                return Ok(0);
            }
            if !planted::is(Bug::LogCutBeforeCopy) {
                state.copy_forward(point);
            }
            point
        };
        self.flush().await?;
        self.state.borrow_mut().first = point;
        self.flush_marker().await?;
        let cut = self.state.borrow_mut().forget_cut();
        let count = cut.len();
        undeleted.extend(cut);
        self.delete(&mut undeleted).await?;
        Ok(count)
    }

    /// Deletes blobs that were cut off; those that are refused stay for the next time.
    async fn delete(&self, undeleted: &mut Vec<BlobId>) -> Result<(), LogError> {
        while !undeleted.is_empty() {
            let some = undeleted[..undeleted.len().min(DELETES_AT_ONCE)].to_vec();
            let count = some.len();
            self.blobs.delete(some).await?;
            undeleted.drain(..count);
        }
        Ok(())
    }
}
