//! What is wanted against what is there: pure, so that a sync and whoever explains one decide alike.

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// What has to be done with one target tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// The tag has the wanted digest.
    Unchanged,
    /// The tag does not exist and was not written by us before.
    Copy,
    /// The tag has another digest.
    Update,
    /// The tag had the wanted digest when we last looked, and is gone or has been changed.
    Restore,
}

/// Decides what to do with a tag that is wanted to have the digest `wanted`, has `present`, and had `last` after the
/// last run.
#[must_use]
pub fn plan(wanted: &Digest, present: Option<&Digest>, last: Option<&Digest>) -> Action {
    match present {
        Some(present) if present == wanted => Action::Unchanged,
        _ if last == Some(wanted) => Action::Restore,
        Some(_) => Action::Update,
        None => Action::Copy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_one_action() {
        let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        for (present, last, expected) in [
            (None, None, Action::Copy),
            (None, Some(&a), Action::Restore),
            (None, Some(&b), Action::Copy),
            (Some(&a), None, Action::Unchanged),
            (Some(&a), Some(&a), Action::Unchanged),
            (Some(&a), Some(&b), Action::Unchanged),
            (Some(&b), None, Action::Update),
            (Some(&b), Some(&a), Action::Restore),
            (Some(&b), Some(&b), Action::Update),
        ] {
            assert_eq!(plan(&a, present, last), expected, "present {present:?}, last {last:?}");
        }
    }
}
