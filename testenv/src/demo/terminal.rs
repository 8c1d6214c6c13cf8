//! What the demo says, and how: numbered steps with a line on why, and below them the commands and their output. A
//! reader who has gone away (`make demo | head`) is no error of the demo.

use std::io::Write;

const STEPS: u32 = 10;
const INDENT: &str = "      ";

/// Begins a step.
pub(super) fn step(number: u32, title: &str, why: &str) {
    write(&format!("\n[{number}/{STEPS}] {title}\n{INDENT}{why}\n"));
}

/// A line at the margin.
pub(super) fn say(line: &str) {
    write(&format!("{line}\n"));
}

/// A command that is about to run.
pub(super) fn command(line: &str) {
    write(&format!("{INDENT}$ {line}\n"));
}

/// What a command printed, or the demo itself found.
pub(super) fn output(text: &str) {
    for line in text.lines() {
        write(&format!("{INDENT}{}\n", line.trim_end()));
    }
}

/// Bytes as people read them.
pub(super) fn megabytes(bytes: u64) -> String {
    let tenths = bytes.saturating_add(50_000) / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// A digest, short enough for a table; the comparison was with all of it.
pub(super) fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}

fn write(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn megabytes_are_rounded_to_one_digit() {
        assert_eq!(
            (megabytes(0), megabytes(8_349_999), megabytes(8_350_000)),
            ("0.0".into(), "8.3".into(), "8.4".into())
        );
    }
}
