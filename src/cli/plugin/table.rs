//! Columns and ages as kubectl prints them.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::api::v1alpha1::ImageMirror;

/// Rows with columns that are as wide as their widest entry.
pub(super) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let head = head.map(ToOwned::to_owned);
    let mut widths = [0; N];
    for row in rows.iter().chain([&head]) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("   ").trim_end())
    };
    [&head].into_iter().chain(rows).map(line).collect()
}

/// How long ago: in the one or two largest units, as kubectl has it.
pub(super) fn age(since: Option<&Time>, now: Timestamp) -> String {
    let Some(since) = since else { return "<none>".to_owned() };
    let seconds = now.duration_since(since.0).as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 48 => format!("{hours}h"),
        () => format!("{days}d"),
    }
}

/// A condition of an object.
pub(super) fn condition<'a>(mirror: &'a ImageMirror, kind: &str) -> Option<&'a Condition> {
    mirror.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_ages_short() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        assert_eq!(
            table(["NAME", "AGE"], &[row("a", "1s"), row("longer", "2s")]),
            "NAME     AGE\na        1s\nlonger   2s\n"
        );
        let now = Timestamp::UNIX_EPOCH;
        let ago = |seconds: i64| age(Some(&Time(now - std::time::Duration::from_secs(seconds.unsigned_abs()))), now);
        assert_eq!([0, 119, 120, 7199, 10800, 200_000].map(ago), ["0s", "119s", "2m", "119m", "3h", "2d"]);
        assert_eq!(age(None, now), "<none>");
    }
}
