//! Durations as Go and Kubernetes write them: `90s`, `1h30m`, `500ms`.

use std::time::Duration;

/// Longer text is no duration that anybody means. Within this length no number is too large for the parser.
const MAX_LEN: usize = 16;

/// Parses a duration. `None` for text that is not one, and for anything with a sign.
///
/// kube's parser panics on a number that is too large and on a sign in the middle, so that neither gets to it.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    if text.is_empty() || text.len() > MAX_LEN || text.contains(['-', '+']) {
        return None;
    }
    let duration = text.parse::<kube::core::Duration>().ok().map(Duration::from)?;
    // Go counts nanoseconds in 63 bits.
    i64::try_from(duration.as_nanos()).is_ok().then_some(duration)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_mins(90)));
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        for bad in ["", "5", "soon", "-5s", "5s-3s", "99999999999999999999h"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        // The largest that there is, and of that length one that is no panic.
        assert!(parse_duration("2562047h").is_some());
        assert_eq!(parse_duration("2562048h"), None);
        assert_eq!(parse_duration("999999999999999h"), None);
    }

    proptest! {
        #[test]
        fn hours_minutes_and_seconds_add_up(hours in 0..10_000_u64, minutes in 0..100_u64, seconds in 0..1000_u64) {
            let text = format!("{hours}h{minutes}m{seconds}s");
            let expected = Duration::from_secs(hours * 3600 + minutes * 60 + seconds);
            prop_assert_eq!(parse_duration(&text), Some(expected));
        }

        #[test]
        fn any_text_is_read_or_refused(text in r"([0-9]{1,9}|[hmsnu\u{b5}\u{3bc}]|ms|\.|-|\+|e|\PC){0,10}") {
            let read = parse_duration(&text);
            prop_assert!(read.is_none() || !text.contains(['-', '+']), "{text} is {read:?}");
        }
    }
}
