//! Hosts that are no registries. One only listens: it keeps the first bytes that every connection sends and closes it;
//! what it has not heard has not been sent.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

/// A running listener; dropping it stops it.
pub(super) struct Listener {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    task: JoinHandle<()>,
}

impl Listener {
    /// On an address of this machine.
    pub(super) async fn at(address: &str) -> Result<Self> {
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?;
        let heard = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let task = tokio::spawn(listen(listener, Arc::clone(&heard)));
        Ok(Self { address, heard, task })
    }

    pub(super) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    /// The first bytes of every connection.
    pub(super) fn heard(&self) -> Vec<Vec<u8>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A server without TLS whose answers begin like this and never end, a byte at a time.
pub(super) async fn trickle(beginning: &'static str) -> Result<(String, JoinSet<()>)> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let host = listener.local_addr()?.to_string();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let mut every = tokio::time::interval(Duration::from_millis(20));
                // An answer that comes before the request would be refused for that.
                let _ = stream.read(&mut [0; 4096]).await;
                let mut next = beginning.as_bytes();
                while stream.write_all(next).await.is_ok() {
                    every.tick().await;
                    next = b"a";
                }
            });
        }
    });
    Ok((host, tasks))
}

async fn listen(listener: TcpListener, heard: Arc<Mutex<Vec<Vec<u8>>>>) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        let position = {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.push(Vec::new());
            heard.len() - 1
        };
        let mut bytes = vec![0; 8 << 10];
        // A client that says nothing has been heard all the same.
        if let Ok(Ok(count)) = tokio::time::timeout(Duration::from_secs(1), stream.read(&mut bytes)).await {
            bytes.truncate(count);
            heard.lock().unwrap_or_else(PoisonError::into_inner)[position] = bytes;
        }
    }
}

/// A second address of this machine for a server that has one already: `127.0.0.2:PORT`. Ends when it is dropped.
pub(super) struct Relay {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Relay {
    pub(super) async fn to(host: &str) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.2", 0)).await?;
        let address = listener.local_addr()?;
        let host = host.to_owned();
        let count = Arc::<AtomicUsize>::default();
        let connections = Arc::clone(&count);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let host = host.clone();
                connections.spawn(async move {
                    let Ok(mut far) = tokio::net::TcpStream::connect(host).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        Ok(Self { address, connections, task })
    }

    pub(super) fn host(&self) -> String {
        self.address.to_string()
    }

    /// How many have come.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}
