//! What the demo and the end-to-end test say, and how: steps, and below them the commands and their output. A reader
//! who has gone away (`make demo | head`) is no error.

use std::io::Write;

const DEMO_STEPS: u32 = 10;
const INDENT: &str = "      ";

/// Begins a step of the demo, with a line on why.
pub(crate) fn step(number: u32, title: &str, why: &str) {
    write(&format!("\n[{number}/{DEMO_STEPS}] {title}\n{INDENT}{why}\n"));
}

/// A line at the margin.
pub(crate) fn say(line: &str) {
    write(&format!("{line}\n"));
}

/// A command that is about to run.
pub(crate) fn command(line: &str) {
    write(&format!("{INDENT}$ {line}\n"));
}

/// What a command printed, or we found ourselves.
pub(crate) fn output(text: &str) {
    for line in text.lines() {
        write(&format!("{INDENT}{}\n", line.trim_end()));
    }
}

/// Bytes as people read them.
pub(crate) fn megabytes(bytes: u64) -> String {
    let tenths = bytes.saturating_add(50_000) / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// A digest, short enough for a table; the comparison was with all of it.
pub(crate) fn short(digest: &str) -> &str {
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
