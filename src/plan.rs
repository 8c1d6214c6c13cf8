//! What is wanted against what is there: pure, so that a sync and whoever explains one decide alike.

use serde::{Deserialize, Serialize};

use crate::oci::Digest;

/// What to do where there is a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// A tag has a new digest at the source.
    pub source_moved: SourceMoved,
    /// The target tag has another digest than the wanted one.
    pub overwrite: Overwrite,
}

/// The status names so many images; what is ours is known of them alone.
const MAX_OWNED: usize = 100;
/// More wanted tags than this are not copied.
pub(crate) const MAX_IMAGES: usize = 10_000;

impl Policy {
    /// How many tags one mirror can want.
    #[must_use]
    pub fn max_images(self) -> usize {
        let needs_memory = self.overwrite == Overwrite::IfOwned || self.source_moved == SourceMoved::Keep;
        if needs_memory { MAX_OWNED } else { MAX_IMAGES }
    }

    /// Why `wanted` tags are too many, and what to do.
    #[must_use]
    pub fn too_many(self, wanted: usize) -> Option<String> {
        let most = self.max_images();
        let because = if most == MAX_OWNED { " with policy.overwrite IfOwned or policy.sourceMoved Keep" } else { "" };
        let what = || {
            format!("{wanted} tags are wanted, at most {most} can be{because}: narrow select, or write several mirrors")
        };
        (wanted > most).then(what)
    }
}

/// What to do when a tag has a new digest at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "operator", derive(schemars::JsonSchema), schemars(description = ""))]
pub enum SourceMoved {
    /// Copy it.
    #[default]
    Update,
    /// Keep at the target what was mirrored first.
    Keep,
}

/// What to do when the target tag has a digest that is not the wanted one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "operator", derive(schemars::JsonSchema), schemars(description = ""))]
pub enum Overwrite {
    /// Write the tag.
    #[default]
    Always,
    /// Write it if its digest is one that was written here for it.
    IfOwned,
    /// Leave it.
    Never,
}

/// What has to be done with one target tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// The tag has the wanted digest.
    Unchanged,
    /// The tag does not exist and was not written by us before.
    Copy,
    /// The tag has another digest.
    Update,
    /// The tag had the wanted digest when we last looked, and is gone or has been changed.
    Restore,
    /// The tag has moved at the source, and the policy keeps what the target has.
    Keep,
    /// The tag has a digest that the policy does not let us overwrite.
    Leave,
}

impl Action {
    /// Whether the tag is written.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Copy | Self::Update | Self::Restore)
    }
}

/// What has to be done with one target tag, and which digest it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What has to be done.
    pub action: Action,
    /// The digest that the tag is wanted to have.
    pub wanted: Digest,
}

/// Decides what to do with a tag that the source would give the digest `source`, that has `present` at the target, and
/// had `last` after the last run. A digest is ours if it is `last`, and foreign if it is any other.
#[must_use]
pub fn plan(policy: Policy, source: &Digest, present: Option<&Digest>, last: Option<&Digest>) -> Step {
    let kept = last.filter(|last| policy.source_moved == SourceMoved::Keep && *last != source);
    let wanted = kept.unwrap_or(source);
    let may_overwrite = |present: &Digest| match policy.overwrite {
        Overwrite::Always => true,
        Overwrite::IfOwned => last == Some(present),
        Overwrite::Never => false,
    };
    let action = match present {
        Some(present) if present == wanted && kept.is_some() => Action::Keep,
        Some(present) if present == wanted => Action::Unchanged,
        Some(present) if !may_overwrite(present) => Action::Leave,
        _ if last == Some(wanted) => Action::Restore,
        Some(_) => Action::Update,
        None => Action::Copy,
    };
    Step { action, wanted: wanted.clone() }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;

    const SOURCE_MOVED: [SourceMoved; 2] = [SourceMoved::Update, SourceMoved::Keep];
    const OVERWRITE: [Overwrite; 3] = [Overwrite::Always, Overwrite::IfOwned, Overwrite::Never];

    fn digest(name: char) -> Digest {
        Digest::sha256(&[name as u8])
    }

    /// The source has `n`. What was mirrored last is nothing, the same, or `o`; what is present is nothing, `n`, `o`, or
    /// `f`, which nobody here has written.
    #[test]
    fn every_case_has_one_action() {
        use Action::{Copy, Keep, Leave, Restore, Unchanged, Update};
        // Columns: Update with Always, IfOwned, Never; Keep with Always, IfOwned, Never. Then the digest wanted by Keep.
        for (present, last, expected, kept) in [
            (None, None, [Copy, Copy, Copy, Copy, Copy, Copy], 'n'),
            (None, Some('n'), [Restore, Restore, Restore, Restore, Restore, Restore], 'n'),
            (None, Some('o'), [Copy, Copy, Copy, Restore, Restore, Restore], 'o'),
            (Some('n'), None, [Unchanged; 6], 'n'),
            (Some('n'), Some('n'), [Unchanged; 6], 'n'),
            (Some('n'), Some('o'), [Unchanged, Unchanged, Unchanged, Restore, Leave, Leave], 'o'),
            (Some('o'), Some('o'), [Update, Update, Leave, Keep, Keep, Keep], 'o'),
            (Some('f'), None, [Update, Leave, Leave, Update, Leave, Leave], 'n'),
            (Some('f'), Some('n'), [Restore, Leave, Leave, Restore, Leave, Leave], 'n'),
            (Some('f'), Some('o'), [Update, Leave, Leave, Restore, Leave, Leave], 'o'),
        ] {
            let policies = SOURCE_MOVED.iter().flat_map(|moved| OVERWRITE.iter().map(move |over| (*moved, *over)));
            for ((source_moved, overwrite), expected) in policies.zip(expected) {
                let policy = Policy { source_moved, overwrite };
                let (present, last) = (present.map(digest), last.map(digest));
                let step = plan(policy, &digest('n'), present.as_ref(), last.as_ref());
                let wanted = if source_moved == SourceMoved::Keep { kept } else { 'n' };
                let what = format!("{policy:?}, present {present:?}, last {last:?}");
                assert_eq!(step, Step { action: expected, wanted: digest(wanted) }, "{what}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_planned_and_done_leaves_nothing_to_do(
            source_moved in select(&SOURCE_MOVED), overwrite in select(&OVERWRITE),
            source in select(&['a', 'b', 'c']), present in select(&[None, Some('a'), Some('b'), Some('c')]),
            last in select(&[None, Some('a'), Some('b')]),
        ) {
            let policy = Policy { source_moved, overwrite };
            let (source, present, last) = (digest(source), present.map(digest), last.map(digest));
            let step = plan(policy, &source, present.as_ref(), last.as_ref());
            let (present, last) = match step.action {
                Action::Leave => (present, last),
                _ => (Some(step.wanted.clone()), Some(step.wanted.clone())),
            };
            let again = plan(policy, &source, present.as_ref(), last.as_ref());
            prop_assert!(!again.action.writes(), "{step:?}, then {again:?}");
            prop_assert_eq!(again.action == Action::Leave, step.action == Action::Leave);
        }
    }
}
