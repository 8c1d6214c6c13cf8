//! A plain TCP forwarder that is a slow or far line: it limits bytes per second and delays each direction and the
//! connection's start. It does not look into TLS. Each direction's limit is shared by all connections, as on a line.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::pace::{PIECE, Pace};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Pieces in flight in one direction: what bandwidth times delay needs, up to 100 MB/s with 40 ms.
const IN_FLIGHT: usize = 256;

/// What the line is like.
#[derive(Clone, Debug)]
pub struct ForwarderBuilder {
    upstream: String,
    listen: String,
    bytes_per_second: Option<u64>,
    delay: Duration,
}

/// A running forwarder; dropping it closes all its connections.
pub struct Forwarder {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Forwarder {
    /// A line to `host` (`127.0.0.1:PORT`) without limit and delay.
    #[must_use]
    pub fn to(host: &str) -> ForwarderBuilder {
        ForwarderBuilder {
            upstream: host.to_owned(),
            listen: "127.0.0.1:0".to_owned(),
            bytes_per_second: None,
            delay: Duration::ZERO,
        }
    }

    /// Where it listens: `127.0.0.1:PORT`, if nothing else was asked for.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// How many connections have been made to it.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ForwarderBuilder {
    /// At this address and port; port 0 is any.
    #[must_use]
    pub fn listen(self, address: &str) -> Self {
        Self { listen: address.to_owned(), ..self }
    }

    /// In each direction.
    #[must_use]
    pub fn bytes_per_second(self, bytes: u64) -> Self {
        Self { bytes_per_second: Some(bytes), ..self }
    }

    /// Of each direction: a round trip takes twice that, and so does a connect.
    #[must_use]
    pub fn delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    pub async fn start(self) -> Result<Forwarder> {
        let listener = TcpListener::bind(&self.listen).await.context("listen")?;
        let address = listener.local_addr()?;
        let up = Arc::new(Pace::new(self.bytes_per_second));
        let down = Arc::new(Pace::new(self.bytes_per_second));
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        let task = tokio::spawn(async move {
            // Dropped with this task, and its connections with it.
            let mut connections = JoinSet::new();
            loop {
                while connections.try_join_next().is_some() {}
                let Ok((client, _)) = listener.accept().await else { continue };
                count.fetch_add(1, Ordering::Relaxed);
                connections.spawn(forward(client, self.clone(), Arc::clone(&up), Arc::clone(&down)));
            }
        });
        Ok(Forwarder { address, accepted, task })
    }
}

async fn forward(client: TcpStream, line: ForwarderBuilder, up: Arc<Pace>, down: Arc<Pace>) {
    tokio::time::sleep(line.delay * 2).await;
    let connect = tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(&line.upstream)).await;
    let Ok(Ok(upstream)) = connect else { return };
    // Otherwise small pieces wait for the other side's delayed acknowledgement, which is no property of the line.
    let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (upstream_read, upstream_write) = upstream.into_split();
    tokio::join!(
        copy(client_read, upstream_write, line.delay, &up),
        copy(upstream_read, client_write, line.delay, &down),
    );
}

/// Copies one direction. Reading and writing go on side by side, so that the delay costs no bandwidth.
async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Duration, pace: &Pace) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Bytes)>(IN_FLIGHT);
    let read = async move {
        let mut buffer = vec![0; PIECE];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            pace.take(n).await;
            let piece = Bytes::copy_from_slice(&buffer[..n]);
            if sender.send((Instant::now() + delay, piece)).await.is_err() {
                break;
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}
