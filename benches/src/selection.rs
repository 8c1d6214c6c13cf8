//! How long it takes to choose among the tags of a large repository, once they have been read.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use imagemirror::oci::Tag;
use imagemirror::select::{Rules, Selection};

const TAGS: u32 = 50_000;
const ROUNDS: usize = 11;

/// The table.
pub(crate) fn table() -> Result<String> {
    let tags: Vec<Tag> = (0..TAGS).map(tag).collect::<Result<_>>()?;
    let mut text = format!("## Choosing among {TAGS} tags\n\n| rule | chosen | ms |\n|---|---:|---:|\n");
    for rule in [
        r#"{"pattern": ".*"}"#,
        r#"{"semver": ">=7.60 <8", "limit": 20}"#,
        r#"{"pattern": "(?P<version>.+)-alpine", "extract": "$version", "semver": "*", "limit": 20}"#,
        r#"{"pattern": "v?[0-9.]+", "exclude": [".*-rc.*"], "sortBy": "Alphabetical", "limit": 20}"#,
    ] {
        let rules: Rules = serde_json::from_str(rule)?;
        let selection = Selection::try_from(rules)?;
        let mut times: Vec<(Duration, usize)> = (0..ROUNDS).map(|_| timed(&selection, &tags)).collect();
        times.sort_unstable();
        let (time, chosen) = *times.get(ROUNDS / 2).context("no rounds")?;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| `{rule}` | {chosen} | {:.1} |", time.as_secs_f64() * 1000.0);
    }
    Ok(text)
}

fn timed(selection: &Selection, tags: &[Tag]) -> (Duration, usize) {
    let begun = Instant::now();
    let chosen = selection.choose(tags).len();
    (begun.elapsed(), chosen)
}

/// Versions, some of them candidates or for another base.
fn tag(number: u32) -> Result<Tag> {
    let (major, minor, patch) = (number % 10, number / 10 % 100, number / 1000);
    let suffix = ["", "", "-rc1", "-alpine"][number as usize % 4];
    format!("{major}.{minor}.{patch}{suffix}").parse().context("a tag")
}
