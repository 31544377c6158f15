//! A connection whose incoming frames' heads are checked before the WebSocket library sees them.
//!
//! The library gives whole messages, however many frames they came in: those are counted here, and no more are read until
//! the session has taken note of them ([`Pieces`]).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::protocol::framing::{Framing, HeadFault};
use crate::session::socket::Pieces;

/// Reads fail with a [`HeadFault`] inside the error, after every frame that came before the bad one.
#[derive(Debug)]
pub(super) struct CheckedFrames<S> {
    inner: S,
    framing: Framing,
    fault: Option<HeadFault>,
    pieces: Pieces,
}

impl<S> CheckedFrames<S> {
    /// A connection at the beginning of a frame.
    pub(super) fn new(inner: S, pieces: Pieces) -> Self {
        Self { inner, framing: Framing::default(), fault: None, pieces }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for CheckedFrames<S> {
    fn poll_read(self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if this.pieces.are_many() {
            // Polled again at once, by a session that takes note of them first.
            task.waker().wake_by_ref();
            return Poll::Pending;
        }
        if this.fault.is_none() {
            std::task::ready!(Pin::new(&mut this.inner).poll_read(task, buffer))?;
            if let Err((fault, good)) = this.framing.check(&buffer.filled()[before..]) {
                buffer.set_filled(before + good);
                this.fault = Some(fault);
            }
            this.pieces.add(this.framing.take_continuations());
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
