//! The heads of a client's WebSocket frames, checked as they come (RFC 6455, 5.2 to 5.5).
//!
//! The library accepts lengths that are not minimal, and judges reserved bits and control frames only once the whole frame
//! is there. Here a frame that may not be is refused at the byte that says so. What depends on more than one head (a
//! continuation of nothing, UTF-8, sizes) stays with the library.

/// What is wrong with a frame's head. The text goes to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadFault {
    /// No extension was negotiated that gives these bits a meaning.
    #[error("a reserved bit is set, and no extension was negotiated")]
    ReservedBit,
    /// 3 to 7, 11 to 15.
    #[error("the opcode is reserved")]
    ReservedOpcode,
    /// Close, ping, pong with FIN unset.
    #[error("a control frame is in pieces")]
    ControlInPieces,
    /// Close, ping, pong above 125 bytes.
    #[error("a control frame has more than 125 bytes")]
    ControlTooLong,
    /// A client's frames are masked.
    #[error("the frame is not masked")]
    NotMasked,
    /// 5.2: the minimal number of bytes must be used.
    #[error("the frame's length is not written in the fewest bytes")]
    LengthNotMinimal,
    /// 5.2: the most significant bit must be 0.
    #[error("the frame's length has its highest bit set")]
    LengthTooLarge,
}

/// Where in a frame the next byte stands.
#[derive(Clone, Copy, Debug)]
enum At {
    First,
    Second { control: bool },
    Length { left: u8, bytes: u8, value: u64 },
    Mask { left: u8, payload: u64 },
    Payload { left: u64 },
}

/// Follows one connection's frames.
#[derive(Clone, Copy, Debug)]
pub struct Framing {
    at: At,
    continuations: u32,
}

impl Default for Framing {
    fn default() -> Self {
        Self { at: At::First, continuations: 0 }
    }
}

impl Framing {
    /// Continuation frames that began since this was last asked.
    pub fn take_continuations(&mut self) -> u32 {
        std::mem::take(&mut self.continuations)
    }

    /// Looks at the next bytes of the connection.
    ///
    /// # Errors
    /// What is wrong, and how many of the bytes belong to frames before the one that is.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), (HeadFault, usize)> {
        let (mut index, mut frame) = (0, 0);
        while let Some(&byte) = bytes.get(index) {
            if let At::Payload { left } = self.at {
                let there = u64::try_from(bytes.len() - index).unwrap_or(u64::MAX);
                let taken = left.min(there);
                self.at = if taken == left { At::First } else { At::Payload { left: left - taken } };
                // At most the slice's length.
                index += usize::try_from(taken).unwrap_or(usize::MAX);
                continue;
            }
            if matches!(self.at, At::First) {
                frame = index;
                self.continuations = self.continuations.saturating_add(u32::from(byte & 0x0f == CONTINUATION));
            }
            self.at = next(self.at, byte).map_err(|fault| (fault, frame))?;
            if let At::Payload { left: 0 } = self.at {
                self.at = At::First;
            }
            index += 1;
        }
        Ok(())
    }
}

/// The opcode of what continues a message.
const CONTINUATION: u8 = 0x0;

/// The place after one byte of a head.
fn next(at: At, byte: u8) -> Result<At, HeadFault> {
    match at {
        At::First => first(byte),
        At::Second { control } => second(control, byte),
        At::Length { left, bytes, value } => {
            let value = value << 8 | u64::from(byte);
            if left > 1 {
                return Ok(At::Length { left: left - 1, bytes, value });
            }
            let least = if bytes == 2 { 126 } else { 1 << 16 };
            match value {
                _ if value < least => Err(HeadFault::LengthNotMinimal),
                _ if value >> 63 == 1 => Err(HeadFault::LengthTooLarge),
                payload => Ok(At::Mask { left: 4, payload }),
            }
        }
        At::Mask { left: 1, payload } => Ok(At::Payload { left: payload }),
        At::Mask { left, payload } => Ok(At::Mask { left: left - 1, payload }),
        At::Payload { left } => Ok(At::Payload { left }),
    }
}

fn first(byte: u8) -> Result<At, HeadFault> {
    let (is_final, opcode) = (byte & 0x80 != 0, byte & 0x0f);
    let control = opcode & 0x08 != 0;
    match opcode {
        _ if byte & 0x70 != 0 => Err(HeadFault::ReservedBit),
        0x3..=0x7 | 0xb..=0xf => Err(HeadFault::ReservedOpcode),
        _ if control && !is_final => Err(HeadFault::ControlInPieces),
        _ => Ok(At::Second { control }),
    }
}

fn second(control: bool, byte: u8) -> Result<At, HeadFault> {
    let length = byte & 0x7f;
    match length {
        _ if byte & 0x80 == 0 => Err(HeadFault::NotMasked),
        _ if control && length > 125 => Err(HeadFault::ControlTooLong),
        126 => Ok(At::Length { left: 2, bytes: 2, value: 0 }),
        127 => Ok(At::Length { left: 8, bytes: 8, value: 0 }),
        length => Ok(At::Mask { left: 4, payload: u64::from(length) }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A masked frame; the mask is zero, so the payload is as it is.
    fn frame(first: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![first];
        match length {
            0..=125 => bytes.push(0x80 | length as u8),
            126..=0xffff => {
                bytes.push(0x80 | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                bytes.push(0x80 | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend([0; 4]);
        bytes.extend(std::iter::repeat_n(0xff, length));
        bytes
    }

    /// In pieces of this size; where in the whole it failed.
    fn check(bytes: &[u8], piece: usize) -> Result<(), (HeadFault, usize)> {
        let mut framing = Framing::default();
        for (number, part) in bytes.chunks(piece).enumerate() {
            framing.check(part).map_err(|(fault, at)| (fault, number * piece + at))?;
        }
        Ok(())
    }

    #[test]
    fn a_head_that_may_not_be_is_refused() {
        let long = |bytes: &[u8]| [&[0x81][..], bytes, &[0; 4]].concat();
        for (bytes, fault) in [
            (vec![0xc1, 0x80], HeadFault::ReservedBit),
            (vec![0xa1, 0x80], HeadFault::ReservedBit),
            (vec![0x91, 0x80], HeadFault::ReservedBit),
            (vec![0x83, 0x80], HeadFault::ReservedOpcode),
            (vec![0x8b, 0x80], HeadFault::ReservedOpcode),
            (vec![0x8f, 0x80], HeadFault::ReservedOpcode),
            (vec![0x09, 0x80], HeadFault::ControlInPieces),
            (vec![0x08, 0x80], HeadFault::ControlInPieces),
            (vec![0x89, 0xfe], HeadFault::ControlTooLong),
            (vec![0x88, 0xff], HeadFault::ControlTooLong),
            (vec![0x81, 0x00], HeadFault::NotMasked),
            (long(&[0xfe, 0, 125]), HeadFault::LengthNotMinimal),
            (long(&[0xfe, 0, 0]), HeadFault::LengthNotMinimal),
            (long(&[0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff]), HeadFault::LengthNotMinimal),
            (long(&[0xff, 0x80, 0, 0, 0, 0, 0, 0, 0]), HeadFault::LengthTooLarge),
        ] {
            for before in [vec![], frame(0x89, 0), frame(0x01, 300)] {
                let whole = [before.clone(), bytes.clone()].concat();
                assert_eq!(check(&whole, whole.len()), Err((fault, before.len())), "{bytes:02x?}");
                assert_eq!(check(&whole, 1).map_err(|(fault, _)| fault), Err(fault), "{bytes:02x?}");
            }
        }
    }

    #[test]
    fn lengths_at_their_bounds_are_accepted() {
        let frames = [0, 1, 125, 126, 127, 0xffff, 0x1_0000, 70_000].map(|length| frame(0x82, length)).concat();
        let controls = [0x88, 0x89, 0x8a].map(|first| frame(first, 125)).concat();
        let whole = [frames, controls].concat();
        for piece in [1, 2, 3, 7, 1_024, whole.len()] {
            assert_eq!(check(&whole, piece), Ok(()));
        }
    }

    #[test]
    fn continuations_are_counted_and_nothing_else() {
        let whole =
            [frame(0x01, 5), frame(0x00, 0), frame(0x89, 0), frame(0x00, 300), frame(0x80, 1), frame(0x81, 0)].concat();
        for piece in [1, 2, 7, whole.len()] {
            let mut framing = Framing::default();
            whole.chunks(piece).for_each(|part| framing.check(part).unwrap());
            assert_eq!((framing.take_continuations(), framing.take_continuations()), (3, 0));
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(bytes in prop::collection::vec(any::<u8>(), 0..200), piece in 1usize..50) {
            let whole = check(&bytes, bytes.len().max(1)).map_err(|(fault, _)| fault);
            prop_assert_eq!(check(&bytes, piece).map_err(|(fault, _)| fault), whole);
        }
    }
}
