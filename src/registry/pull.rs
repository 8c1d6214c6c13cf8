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
        tracing::debug!(host = %error.host, %error, offset = self.offset, "continuing a download");
        if self.breaks > 1 {
            self.source.back_off(self.breaks - 1).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        auth::CredentialStore,
        oci::Digest,
        registry::{Access, Client, ClientOptions, Floor, Timing, Transport},
    };

    /// More than is read at once.
    const SIZE: usize = 200_000;

    #[tokio::test]
    async fn a_source_is_not_slow_because_nobody_reads() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let asked = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&asked);
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let _ = stream.read(&mut [0; 4096]).await;
                let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n");
                let _ = stream.write_all(&[head.as_bytes(), &vec![0; SIZE][..]].concat()).await;
            }
        });
        let window = Duration::from_millis(500);
        let timing = Timing { floor: Floor { per_second: 1 << 20, window }, ..Timing::default() };
        let client = Client::new(ClientOptions { timing, ..ClientOptions::default() });
        let transport = Transport { plain_http: true, ..Transport::default() };
        let access = Access { host: host.parse().unwrap(), transport, credentials: CredentialStore::default() };
        let source = Repository::for_pull(&client, &access, "a".parse().unwrap()).unwrap();
        let blob =
            Descriptor { media_type: String::new(), digest: Digest::sha256(b""), size: SIZE as u64, urls: Vec::new() };
        let mut stream = source.pull(&blob, 0).await.unwrap();
        let mut read = stream.next().await.unwrap().unwrap().len();
        assert!(read < SIZE, "all of it at once");
        // The target takes no more for longer than the window.
        tokio::time::sleep(window + window / 5).await;
        while let Some(chunk) = stream.next().await {
            read += chunk.unwrap().len();
        }
        assert_eq!((read, asked.load(Ordering::Relaxed)), (SIZE, 1));
        server.abort();
    }
}
