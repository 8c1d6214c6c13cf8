//! Reading a blob to its end: a download that breaks is continued where it broke.

use futures::{StreamExt as _, stream::try_unfold};

use super::{body::BlobStream, error::Error, repository::Repository};
use crate::oci::Descriptor;

/// Times a download may break without a new byte.
const MAX_BREAKS: u32 = 3;

struct Pull {
    source: Repository,
    blob: Descriptor,
    stream: Option<BlobStream>,
    offset: u64,
    breaks: u32,
}

impl Repository {
    /// The bytes of a blob from `offset` on, continued where the connection broke. The registry is asked again, never
    /// the place it redirected to: signed addresses run out. Nothing is hashed here.
    pub(super) async fn pull(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, Error> {
        // The rest of nothing cannot be asked for.
        if offset >= blob.size {
            return Ok(futures::stream::empty().boxed());
        }
        let (_, stream) = self.blob(blob, offset).await?;
        let pull = Pull { source: self.clone(), blob: blob.clone(), stream: Some(stream), offset, breaks: 0 };
        let pulled = try_unfold(pull, |mut pull| async move {
            loop {
                let Some(stream) = &mut pull.stream else {
                    match pull.source.blob(&pull.blob, pull.offset).await {
                        Ok((_, stream)) => pull.stream = Some(stream),
                        Err(error) => pull.broke(error).await?,
                    }
                    continue;
                };
                match stream.next().await {
                    Some(Ok(chunk)) => {
                        pull.offset += chunk.len() as u64;
                        pull.breaks = 0;
                        return Ok(Some((chunk, pull)));
                    }
                    Some(Err(error)) => pull.broke(error).await?,
                    None => return Ok(None),
                }
            }
        });
        Ok(pulled.boxed())
    }
}

impl Pull {
    /// Waits before the next attempt, or gives the error back when there were too many.
    async fn broke(&mut self, error: Error) -> Result<(), Error> {
        self.stream = None;
        self.breaks += 1;
        if self.breaks > MAX_BREAKS || !error.is_retryable() {
            return Err(error);
        }
        tracing::debug!(%error, offset = self.offset, "continuing a download");
        if self.breaks > 1 {
            self.source.back_off(self.breaks - 1).await;
        }
        Ok(())
    }
}
