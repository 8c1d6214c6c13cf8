//! The gzip format (RFC 1952) without any compression: what a layer must be for whoever unpacks it, in few lines and the
//! same bytes for ever.

/// The most that a stored block holds (RFC 1951, section 3.2.4).
const BLOCK: usize = 0xffff;

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    // Deflate, no flags, no time, no hint, unknown system.
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    let mut blocks = bytes.chunks(BLOCK).peekable();
    loop {
        let block = blocks.next().unwrap_or_default();
        let length = u16::try_from(block.len()).unwrap_or(u16::MAX);
        let is_last = blocks.peek().is_none();
        out.push(u8::from(is_last));
        out.extend(length.to_le_bytes());
        out.extend((!length).to_le_bytes());
        out.extend(block);
        if is_last {
            break;
        }
    }
    out.extend(crc32(bytes).to_le_bytes());
    // Modulo 2³², as the format has it.
    out.extend(&bytes.len().to_le_bytes()[..4]);
    out
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0_u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(gzip(b"").len(), 10 + 5 + 8);
        assert_eq!(gzip(&vec![7; BLOCK + 1]).len(), 10 + 5 + BLOCK + 5 + 1 + 8);
    }
}
