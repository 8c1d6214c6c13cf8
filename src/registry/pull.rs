//! Reading a blob to its end: a download that breaks is continued where it broke.

use std::sync::Arc;

use futures::{StreamExt as _, stream::try_unfold};

use super::{body::BlobStream, error::Error, pace::Pace, repository::Repository};
use crate::oci::Descriptor;

/// Times a download may break without progress, and be too slow.
const MAX_BREAKS: u32 = 3;
/// What is no progress: a registry that sends a byte and breaks off would be asked without end.
const PROGRESS: u64 = 64 << 10;

struct Pull {
    source: Repository,
    blob: Descriptor,
    stream: Option<BlobStream>,
    offset: u64,
    breaks: u32,
    broke_at: u64,
    pace: Arc<Pace>,
}

impl Repository {
    /// The bytes of a blob from `offset` on, continued where the connection broke. The registry is asked again, never
    /// the place it redirected to: signed addresses run out. Nothing is hashed here.
    pub(super) async fn pull(&self, blob: &Descriptor, offset: u64) -> Result<BlobStream, Error> {
        // The rest of nothing cannot be asked for.
        if offset >= blob.size {
            return Ok(futures::stream::empty().boxed());
        }
        let mut pull = Pull {
            source: self.clone(),
            blob: blob.clone(),
            stream: None,
            offset,
            breaks: 0,
            broke_at: offset,
            pace: Arc::new(Pace::new(self.client().timing().floor)),
        };
        pull.open().await?;
        let pulled = try_unfold(pull, |mut pull| async move {
            loop {
                let Some(stream) = &mut pull.stream else {
                    if let Err(error) = pull.open().await {
                        pull.broke(error).await?;
                    }
                    continue;
                };
                match stream.next().await {
                    Some(Ok(chunk)) => {
                        pull.offset += chunk.len() as u64;
                        if pull.offset - pull.broke_at >= PROGRESS {
                            pull.breaks = 0;
                        }
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
    /// Whoever reads may hold an upload and places at both registries meanwhile, and so is not kept waiting for long.
    async fn open(&mut self) -> Result<(), Error> {
        let patience = self.source.client().timing().hold;
        let (_, stream) = self.source.blob(&self.blob, self.offset, &self.pace, patience).await?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Waits before the next attempt, or gives the error back when there were too many.
    async fn broke(&mut self, error: Error) -> Result<(), Error> {
        self.stream = None;
        self.breaks += 1;
        self.broke_at = self.offset;
        if self.breaks.max(self.pace.slow_windows()) > MAX_BREAKS || !error.is_retryable() {
            return Err(error);
        }
        tracing::debug!(%error, offset = self.offset, "continuing a download");
        if self.breaks > 1 {
            self.source.back_off(self.breaks - 1).await;
        }
        Ok(())
    }
}
