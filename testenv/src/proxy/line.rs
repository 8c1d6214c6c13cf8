//! A TCP connection that can be ended from outside, with FIN or RST, at an exact byte: whoever cuts a body first waits
//! until what was sent before is with the kernel.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::action::Close;

/// The connection. Dropping it closes it, as its control says.
pub(super) struct Line {
    stream: TcpStream,
    control: Arc<Control>,
}

/// The handle for the outside.
#[derive(Debug, Default)]
pub(super) struct Control {
    reset: AtomicBool,
    ended: Notify,
    flush: Mutex<Flush>,
}

#[derive(Debug, Default)]
enum Flush {
    #[default]
    Idle,
    Wanted(Waker),
    Done,
}

impl Line {
    pub(super) fn new(stream: TcpStream) -> (Self, Arc<Control>) {
        // Small answers must not wait for an acknowledgement.
        let _ = stream.set_nodelay(true);
        let control = Arc::new(Control::default());
        (Self { stream, control: Arc::clone(&control) }, control)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.control.reset.load(Ordering::Acquire) {
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl Control {
    /// Says how the connection is to be closed, and wakes its owner, who drops it.
    pub(super) fn end(&self, close: Close) {
        self.reset.store(close == Close::Reset, Ordering::Release);
        self.ended.notify_one();
    }

    /// Waits until somebody calls `end`.
    pub(super) async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Waits until everything written so far is with the kernel. The caller is the body that hyper is sending: it
    /// flushes because the body has nothing more to give.
    pub(super) async fn flushed(&self) {
        std::future::poll_fn(|context| {
            let mut flush = self.flush.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*flush, Flush::Done) {
                *flush = Flush::Idle;
                return Poll::Ready(());
            }
            *flush = Flush::Wanted(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        if poll.is_ready() {
            let mut flush = self.control.flush.lock().unwrap_or_else(PoisonError::into_inner);
            if let Flush::Wanted(waker) = &*flush {
                waker.wake_by_ref();
                *flush = Flush::Done;
            }
        }
        poll
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
