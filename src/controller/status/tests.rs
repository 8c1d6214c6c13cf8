//! The status after each kind of event, and the rules by which waiting tools read it.

use super::{super::runner::Times, *};
use crate::{api::v1alpha1::ImageMirror, copy::Totals, oci::Digest, plan::Action};

fn mirror(images: usize, generation: i64) -> ValidatedMirror {
    let tags: Vec<String> = (0..images).map(|n| format!("'{n}'")).collect();
    // A list of tags holds 100 at most; more images are spread over entries.
    let entries: Vec<String> = tags
        .chunks(100)
        .enumerate()
        .map(|(n, tags)| format!("{{source: gcr.io/a{n}, tags: [{}]}}", tags.join(", ")))
        .collect();
    let text = format!(
        "apiVersion: imagemirror.dev/v1alpha1\nkind: ImageMirror\nmetadata: {{name: a, namespace: n, generation: {generation}}}\n\
         spec: {{images: [{}], target: {{registry: t.io}}}}",
        entries.join(", ")
    );
    let mirror: ImageMirror = serde_saphyr::from_str(&text).unwrap();
    crate::mirror::validate(&mirror).unwrap()
}

fn ended(mirror: &ValidatedMirror, failed: &[(usize, Reason)]) -> Ended {
    let failed: HashMap<usize, Reason> = failed.iter().copied().collect();
    let images = mirror.images.iter().enumerate().map(|(n, image)| {
        let failure =
            failed.get(&n).map(|reason| Failure { reason: *reason, message: format!("it failed with {reason}") });
        ImageReport {
            source: format!("{}/{}", image.source.host, image.source.repository),
            tag: image.source.tag.as_ref().unwrap().to_string(),
            target: mirror.target_of(image),
            digest: failure.is_none().then(|| Digest::sha256(b"x")),
            source_digest: failure.is_none().then(|| Digest::sha256(b"x")),
            action: failure.is_none().then_some(Action::Copy),
            replaced: None,
            failure,
            is_news: true,
        }
    });
    let report = SyncReport {
        started_at: Timestamp::UNIX_EPOCH,
        finished_at: Timestamp::UNIX_EPOCH,
        images: images.collect(),
        totals: Totals::default(),
    };
    Ended {
        number: 0,
        spec_hash: mirror.spec_hash.clone(),
        generation: mirror.generation,
        token: None,
        report,
        problems: Vec::new(),
        fingerprint: Digest::sha256(b""),
        times: Times { all: NOW, authentication: NOW, attached: NOW },
    }
}

fn condition(status: &ImageMirrorStatus, kind: &str) -> Option<(String, String)> {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind)?;
    Some((found.status.clone(), found.reason.clone()))
}

#[allow(clippy::unnecessary_wraps, reason = "what it is compared with is an option")]
fn is(kind: &str, reason: &str) -> Option<(String, String)> {
    Some((kind.to_owned(), reason.to_owned()))
}

/// The rules of kstatus and of Flux's condition checks, with our meaning of `Ready`.
fn check(status: &ImageMirrorStatus) {
    let state = |kind| condition(status, kind).map(|(state, _)| state);
    let ready = state("Ready").expect("Ready is always there");
    let reconciling = state("Reconciling");
    let stalled = state("Stalled");
    assert!(reconciling.is_none() || reconciling.as_deref() == Some("True"), "Reconciling is there only when true");
    assert!(stalled.is_none() || stalled.as_deref() == Some("True"), "Stalled is there only when true");
    assert!(reconciling.is_none() || stalled.is_none(), "never both");
    assert!(ready != "True" || (reconciling.is_none() && stalled.is_none()), "nothing abnormal beside Ready=True");
    assert!(ready != "Unknown" || reconciling.is_some(), "Ready=Unknown only beside Reconciling");
    for condition in &status.conditions {
        assert_eq!(condition.observed_generation, Some(status.observed_generation), "{}", condition.type_);
    }
}

const NOW: Timestamp = Timestamp::UNIX_EPOCH;

#[test]
fn a_new_object_goes_from_unknown_to_ready() {
    let mirror = mirror(3, 1);
    let status = begun(&mirror, &ImageMirrorStatus::default(), NOW);
    check(&status);
    assert_eq!(condition(&status, "Ready"), is("Unknown", "Progressing"));
    assert_eq!(status.synced.as_deref(), Some("0/3"));
    let status = progressing(
        &mirror,
        &status,
        ProgressSnapshot { bytes_done: 1, bytes_total: 2, images_done: 0, images_total: 3 },
        NOW,
    );
    check(&status);
    assert_eq!(status.progress.unwrap().bytes_total, 2);
    let status = finished(&mirror, &status, &ended(&mirror, &[]), NOW);
    check(&status);
    assert_eq!(condition(&status, "Ready"), is("True", "Succeeded"));
    assert_eq!(condition(&status, "Reconciling"), None);
    assert_eq!(condition(&status, "TargetInSync"), is("True", "Succeeded"));
    assert_eq!((status.synced.as_deref(), status.progress), (Some("3/3"), None));
}

#[test]
fn one_failed_image_is_a_partial_failure_and_all_of_one_kind_are_that_kind() {
    let mirror = mirror(2, 1);
    let status = finished(&mirror, &ImageMirrorStatus::default(), &ended(&mirror, &[(1, Reason::SourceNotFound)]), NOW);
    check(&status);
    assert_eq!(condition(&status, "Ready"), is("False", "PartialFailure"));
    assert_eq!(condition(&status, "Reconciling"), is("True", "ProgressingWithRetry"));
    let message = &status.conditions[0].message;
    assert!(message.starts_with("1 of 2 images failed: gcr.io/a0:1 (SourceNotFound"), "{message}");
    let all = [(0, Reason::AuthenticationFailed), (1, Reason::AuthenticationFailed)];
    let status = finished(&mirror, &status, &ended(&mirror, &all), NOW);
    assert_eq!(condition(&status, "Ready"), is("False", "AuthenticationFailed"));
}

#[test]
fn failures_keep_their_beginning_and_count_their_attempts() {
    let mirror = mirror(1, 1);
    let failing = ended(&mirror, &[(0, Reason::SourceUnavailable)]);
    let first = finished(&mirror, &ImageMirrorStatus::default(), &failing, NOW);
    let second = finished(&mirror, &first, &failing, Timestamp::MAX);
    assert_eq!((second.failures[0].since.0, second.failures[0].attempts), (NOW, 2));
    let other = finished(&mirror, &second, &ended(&mirror, &[(0, Reason::SourceNotFound)]), Timestamp::MAX);
    assert_eq!((other.failures[0].since.0, other.failures[0].attempts), (Timestamp::MAX, 1));
}

#[test]
fn a_spec_that_changes_nothing_advances_the_generations_only() {
    let first = mirror(1, 1);
    let status = finished(&first, &ImageMirrorStatus::default(), &ended(&first, &[]), NOW);
    let second = mirror(1, 2);
    let settled = settled(&second, &status, Timestamp::MAX);
    check(&settled);
    assert_eq!(condition(&settled, "Ready"), is("True", "Succeeded"));
    assert_eq!((settled.observed_generation, settled.last_sync), (2, status.last_sync));
}

#[test]
fn a_suspended_object_never_reconciles() {
    let mirror = mirror(1, 1);
    let fresh = suspended(&mirror, &begun(&mirror, &ImageMirrorStatus::default(), NOW), NOW);
    check(&fresh);
    assert_eq!(condition(&fresh, "Ready"), is("False", "Suspended"));
    let synced = finished(&mirror, &ImageMirrorStatus::default(), &ended(&mirror, &[]), NOW);
    let after = suspended(&mirror, &synced, NOW);
    check(&after);
    assert_eq!(condition(&after, "Ready"), is("True", "Succeeded"));
    assert_eq!(condition(&after, "Reconciling"), None);
}

#[test]
fn an_invalid_spec_is_stalled_and_a_good_one_heals_it() {
    let mirror = mirror(1, 2);
    let error = InvalidSpec::unreadable("x", &[]);
    let status = invalid(1, &ImageMirrorStatus::default(), &error, NOW);
    check(&status);
    assert_eq!(condition(&status, "Stalled"), is("True", "InvalidSpec"));
    let status = begun(&mirror, &status, NOW);
    check(&status);
    assert_eq!(condition(&status, "Stalled"), None);
}

#[test]
fn the_status_stays_small_whatever_is_wanted() {
    let mirror = mirror(10_000, 1);
    let all: Vec<_> = (0..10_000).map(|n| (n, Reason::SourceUnavailable)).collect();
    let status = finished(&mirror, &ImageMirrorStatus::default(), &ended(&mirror, &all), NOW);
    assert_eq!((status.images.len(), status.failures.len(), status.truncated), (0, 20, true));
    assert!(serde_json::to_vec(&status).unwrap().len() <= 64 << 10);
}

#[test]
fn long_messages_and_many_images_together_stay_small_too() {
    let mirror = mirror(100, 1);
    let all: Vec<_> = (0..100).map(|n| (n, Reason::SourceUnavailable)).collect();
    let mut failing = ended(&mirror, &all);
    for image in &mut failing.report.images {
        image.source = format!("gcr.io/{}", "a".repeat(250));
        image.target = format!("t.io/{}", "b".repeat(250));
        image.failure = Some(Failure::new(Reason::SourceUnavailable, &"x".repeat(100_000)));
    }
    let status = finished(&mirror, &ImageMirrorStatus::default(), &failing, NOW);
    assert!(serde_json::to_vec(&status).unwrap().len() <= 64 << 10);
}

#[test]
fn a_failure_of_each_class_is_kept_so_that_each_is_tried_again() {
    let mirror = mirror(60, 1);
    let mut all: Vec<_> = (0..58).map(|n| (n, Reason::SourceNotFound)).collect();
    all.extend([(58, Reason::SecretNotFound), (59, Reason::SourceUnavailable)]);
    let status = finished(&mirror, &ImageMirrorStatus::default(), &ended(&mirror, &all), NOW);
    let reasons: Vec<_> = status.failures.iter().map(|failure| failure.reason).take(3).collect();
    assert_eq!(reasons, [Reason::SourceUnavailable, Reason::SecretNotFound, Reason::SourceNotFound]);
}

#[test]
fn a_failed_image_keeps_the_digest_that_its_target_had() {
    let mirror = mirror(1, 1);
    let synced = finished(&mirror, &ImageMirrorStatus::default(), &ended(&mirror, &[]), NOW);
    let failed = finished(&mirror, &synced, &ended(&mirror, &[(0, Reason::SourceNotFound)]), NOW);
    assert_eq!(failed.images[0].digest, synced.images[0].digest);
    assert_eq!(failed.images[0].state, ImageState::Failed);
}

#[test]
fn what_the_policy_leaves_is_skipped_and_said_of_the_target_alone() {
    let mirror = mirror(3, 1);
    let mut ended = ended(&mirror, &[]);
    ended.report.images[0].action = Some(Action::Leave);
    ended.report.images[0].digest = None;
    ended.report.images[1].action = Some(Action::Keep);
    let status = finished(&mirror, &ImageMirrorStatus::default(), &ended, Timestamp::UNIX_EPOCH);
    check(&status);
    assert_eq!(status.synced.as_deref(), Some("1/3"));
    assert_eq!(status.summary.map(|summary| (summary.skipped, summary.failed)), Some((2, 0)));
    let found: Vec<_> = status.images.iter().map(|image| image.state).collect();
    assert_eq!(found, [ImageState::Skipped, ImageState::Skipped, ImageState::Synced]);
    assert_eq!(condition(&status, "Ready"), is("True", "Succeeded"));
    assert_eq!(condition(&status, "TargetInSync"), is("False", "TargetChanged"));
    let in_sync = status.conditions.iter().find(|condition| condition.type_ == "TargetInSync").unwrap();
    assert!(in_sync.message.contains("t.io/a0:0") && !in_sync.message.contains("t.io/a0:1"), "{}", in_sync.message);
}
