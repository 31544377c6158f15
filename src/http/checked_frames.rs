//! A connection whose incoming frames' heads are checked before the WebSocket library sees them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::protocol::framing::{Framing, HeadFault};

/// Reads fail with a [`HeadFault`] inside the error, after every frame that came before the bad one.
#[derive(Debug)]
pub(super) struct CheckedFrames<S> {
    inner: S,
    framing: Framing,
    fault: Option<HeadFault>,
}

impl<S> CheckedFrames<S> {
    /// A connection at the beginning of a frame.
    pub(super) fn new(inner: S) -> Self {
        Self { inner, framing: Framing::default(), fault: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for CheckedFrames<S> {
    fn poll_read(self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if this.fault.is_none() {
            std::task::ready!(Pin::new(&mut this.inner).poll_read(task, buffer))?;
            if let Err((fault, good)) = this.framing.check(&buffer.filled()[before..]) {
                buffer.set_filled(before + good);
                this.fault = Some(fault);
            }
        }
        match this.fault {
            Some(fault) if buffer.filled().len() == before => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault)))
            }
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for CheckedFrames<S> {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(task, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(task)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(task, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
