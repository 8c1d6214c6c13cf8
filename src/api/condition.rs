//! Conditions as `kubectl wait`, Flux, Helm and Argo CD read them (kstatus): `Ready` always, `Reconciling` and
//! `Stalled` only while they are true.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::Reason;

/// The condition types of an `ImageMirror`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// The last run ended with nothing failed, for this generation.
    Ready,
    /// This generation, or a requested token, has not completed a run; or a failure is being retried.
    Reconciling,
    /// Nothing but a change of the spec can help.
    Stalled,
    /// Every named Secret exists and parses.
    CredentialsResolved,
    /// Every wanted tag at the target has the wanted digest.
    TargetInSync,
}

/// The status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// It is not known yet.
    Unknown,
}

impl ConditionType {
    /// The name as users see it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
            Self::CredentialsResolved => "CredentialsResolved",
            Self::TargetInSync => "TargetInSync",
        }
    }
}

impl Status {
    /// The name as users see it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// The conditions of one object while they are worked out. A condition keeps its transition time as long as its
/// status stays the same.
#[derive(Clone, Debug)]
pub struct ConditionSet {
    conditions: Vec<Condition>,
    generation: i64,
    now: Timestamp,
}

/// Longer messages are cut: conditions are read by people, and stored in every watch event.
const MAX_MESSAGE: usize = 1024;

impl ConditionSet {
    /// Starts from the conditions that the object has.
    #[must_use]
    pub fn new(current: &[Condition], generation: i64, now: Timestamp) -> Self {
        Self { conditions: current.to_vec(), generation, now }
    }

    /// Sets a condition for the current generation.
    pub fn set(&mut self, kind: ConditionType, status: Status, reason: Reason, message: &str) {
        let previous = self.conditions.iter().find(|condition| condition.type_ == kind.as_str());
        let last_transition_time = match previous {
            Some(previous) if previous.status == status.as_str() => previous.last_transition_time.clone(),
            _ => Time(self.now),
        };
        let condition = Condition {
            type_: kind.as_str().to_owned(),
            status: status.as_str().to_owned(),
            reason: reason.as_str().to_owned(),
            message: message.chars().take(MAX_MESSAGE).collect(),
            observed_generation: Some(self.generation),
            last_transition_time,
        };
        self.remove(kind);
        self.conditions.push(condition);
    }

    /// Removes a condition that does not hold any more.
    pub fn remove(&mut self, kind: ConditionType) {
        self.conditions.retain(|condition| condition.type_ != kind.as_str());
    }

    /// Whether the condition has this status.
    #[must_use]
    pub fn is(&self, kind: ConditionType, status: Status) -> bool {
        self.conditions.iter().any(|condition| condition.type_ == kind.as_str() && condition.status == status.as_str())
    }

    /// The conditions in their usual order, those that were kept brought to the current generation.
    #[must_use]
    pub fn finish(mut self) -> Vec<Condition> {
        for condition in &mut self.conditions {
            condition.observed_generation = Some(self.generation);
        }
        let order = |condition: &Condition| {
            [
                ConditionType::Ready,
                ConditionType::Reconciling,
                ConditionType::Stalled,
                ConditionType::CredentialsResolved,
                ConditionType::TargetInSync,
            ]
            .iter()
            .position(|kind| kind.as_str() == condition.type_)
        };
        self.conditions.sort_by_key(|condition| order(condition).unwrap_or(usize::MAX));
        self.conditions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transition_time_moves_only_with_the_status() {
        let first = Timestamp::UNIX_EPOCH;
        let later = Timestamp::MAX;
        let mut set = ConditionSet::new(&[], 1, first);
        set.set(ConditionType::Ready, Status::Unknown, Reason::Progressing, "a");
        let conditions = set.finish();
        let mut set = ConditionSet::new(&conditions, 2, later);
        set.set(ConditionType::Ready, Status::Unknown, Reason::Progressing, "b");
        let conditions = set.finish();
        assert_eq!((conditions[0].last_transition_time.0, conditions[0].observed_generation), (first, Some(2)));
        let mut set = ConditionSet::new(&conditions, 2, later);
        set.set(ConditionType::Ready, Status::True, Reason::Succeeded, "c");
        assert_eq!(set.finish()[0].last_transition_time.0, later);
    }
}
