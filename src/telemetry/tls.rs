//! TLS for the metrics: a listener whose certificate changes when its files do.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::serve::Listener;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

use super::server::{Bounded, Connection};

/// A certificate and a key that cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("they are not a valid PEM certificate and its key")]
pub struct TlsError;

/// What a server needs to show this certificate chain (PEM) with its key (PEM).
pub fn server_config(chain: &[u8], key: &[u8]) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>().map_err(|_| TlsError)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| TlsError)?;
    let builder = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|_| TlsError)?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key).map_err(|_| TlsError)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A listener whose connections begin with a handshake, by what the configuration is then.
pub(super) struct Secured {
    pub(super) listener: Bounded,
    pub(super) config: watch::Receiver<Arc<ServerConfig>>,
}

impl Listener for Secured {
    type Io = Secure;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Secure, SocketAddr) {
        let (connection, address) = self.listener.accept().await;
        let acceptor = TlsAcceptor::from(Arc::clone(&self.config.borrow()));
        (Secure::Handshake(Box::new(acceptor.accept(connection))), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that makes its handshake when it is first read from, so that it holds up nobody else.
pub(super) enum Secure {
    Handshake(Box<Accept<Connection>>),
    Open(Box<TlsStream<Connection>>),
    Broken,
}

impl Secure {
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut TlsStream<Connection>>>> {
        if let Self::Handshake(accept) = self {
            *self = match ready!(Pin::new(accept.as_mut()).poll(cx)) {
                Ok(stream) => Self::Open(Box::new(stream)),
                Err(error) => {
                    tracing::debug!(%error, "a connection to the metrics was refused");
                    Self::Broken
                }
            };
        }
        Poll::Ready(match self {
            Self::Open(stream) => Ok(Pin::new(stream.as_mut())),
            _ => Err(io::ErrorKind::ConnectionAborted.into()),
        })
    }
}

impl AsyncRead for Secure {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_open(cx))?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secure {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_open(cx))?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_open(cx))?.poll_shutdown(cx)
    }
}
