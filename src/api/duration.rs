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
    text.parse::<kube::core::Duration>().ok().map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_mins(90)));
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        for bad in ["", "5", "soon", "-5s", "5s-3s", "99999999999999999999h"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        // The largest of that length is long, and no panic.
        assert!(parse_duration("999999999999999h").is_some());
    }
}
