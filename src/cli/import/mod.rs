//! `imagemirror import regsync|portager FILE`: another program's configuration as `ImageMirror`s on standard output. What
//! has no equal is said in comments above the object that it is about. Passwords are never printed.

mod draft;
mod portager;
mod regsync;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Failure, read_text, say};
use draft::OneLine;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Whose configuration it is.
    #[arg(value_enum)]
    format: Format,
    /// The configuration; `-` is standard input.
    file: PathBuf,
}

/// Whose configuration is read.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// regsync's YAML file.
    Regsync,
    /// Portager's `ImageSync` objects.
    Portager,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let text = read_text(&arguments.file)?;
    let drafts = match arguments.format {
        Format::Regsync => regsync::import(&text),
        Format::Portager => portager::import(&text),
    };
    let shown = arguments.file.display();
    let drafts = drafts.map_err(|what| Failure::Usage(format!("{shown} cannot be imported: {what}")))?;
    say(&drafts.to_string());
    if drafts.are_empty() {
        let what = format!("nothing of {shown} could be carried over: the comments on standard output say why");
        return Err(Failure::Failed(what));
    }
    Ok(())
}

/// Reads YAML as the program that it is for does: what is text there stays as it was written. Of an error only the place is
/// said: the rest may quote a password.
fn parse<T: DeserializeOwned>(text: &str, what: &str) -> Result<Vec<T>, String> {
    serde_saphyr::from_multiple(text).map_err(|error| {
        let place = error.location().map(|at| format!("line {}, column {}: ", at.line(), at.column()));
        format!("{}this is not {what}; correct it there", place.unwrap_or_default())
    })
}

/// What is said of the keys of a mapping that no one reads: `explained` has those that are known to have no equal.
fn unread(value: &Value, at: &str, read: &[&str], explained: &[(&str, &str)]) -> Vec<String> {
    let keys = value.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
    // Extensions, which are there for YAML anchors.
    let keys = keys.filter(|key| !read.contains(key) && !key.starts_with("x-"));
    let say = |key: &str| {
        let why = explained.iter().find(|(name, _)| *name == key).map_or("unknown here, and left out", |(_, why)| why);
        format!("{at}{}: {why}", OneLine(key))
    };
    keys.map(say).collect()
}

/// When a mirror runs.
#[derive(Clone, Debug, Default, PartialEq)]
struct Times {
    interval: Option<String>,
    schedule: Option<String>,
    time_zone: Option<String>,
}

impl Times {
    /// Of the `schedule` that robfig/cron reads: five fields with a zone before them, or a word such as `@every 1h`.
    fn of_cron(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (zone, text) = match text.strip_prefix("CRON_TZ=").or_else(|| text.strip_prefix("TZ=")) {
            Some(rest) => {
                rest.split_once(' ').map(|(zone, text)| (Some(zone.to_owned()), text.trim())).unwrap_or_default()
            }
            None => (None, text),
        };
        if let Some(every) = text.strip_prefix("@every ") {
            return Ok(Self { interval: Some(every.trim().to_owned()), ..Self::default() });
        }
        let fields = match text {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            word if word.starts_with('@') => return Err(format!("{} is no schedule", OneLine(word))),
            fields => &fields.replace('?', "*"),
        };
        Ok(Self {
            schedule: Some(fields.split_whitespace().collect::<Vec<_>>().join(" ")),
            time_zone: zone,
            interval: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cli::documents::Documents;

    /// What is printed can be applied as it is, and has no line that is neither an object's nor a comment.
    fn is_valid(printed: &str) -> Result<(), TestCaseError> {
        let mut documents = Documents::default();
        documents.parse(printed, "the import").map_err(|error| TestCaseError::fail(format!("{error}\n{printed}")))?;
        let checked = documents.validated().map(|_| ()).map_err(|error| error.to_string());
        // Nothing at all is no object, which is said elsewhere.
        prop_assert!(checked.is_ok() || printed.lines().all(|line| line.starts_with('#')), "{checked:?}\n{printed}");
        Ok(())
    }

    fn one_of(texts: &'static [&'static str]) -> impl Strategy<Value = String> {
        proptest::sample::select(texts).prop_map(str::to_owned)
    }

    fn step() -> impl Strategy<Value = String> {
        let source = one_of(&[
            "busybox",
            "busybox:1.36",
            "gcr.io/a/b:1",
            "gcr.io/a/b",
            "A b",
            "ocidir://x",
            "{{env}}",
            "r:5000/x@sha256:12",
        ]);
        let target = one_of(&["localhost:5000/busybox", "localhost:5000/b:2", "t.io/x/y", "t.io/busybox:1.36", "?"]);
        let kind = one_of(&["image", "repository", "registry", "other"]);
        let rest = one_of(&[
            "tags: {allow: ['3', '3.\\d+'], deny: ['3.0']}",
            "tags: {semverRange: ['>=1.0.0 <2.0.0', '>=4']}",
            "tags: {allow: ['(']}",
            "schedule: '15 01 * * *'",
            "interval: 60m",
            "interval: 1s",
            "platform: linux/amd64",
            "platforms: [linux]",
            "referrers: true",
            "referrerFilters: [{artifactType: a/b}]",
            "backup: \"a\\nkind: Pod\"",
            "\"x\\n---\\ny\": 1",
            "tagSets: [{allow: [a]}, {deny: [b]}]",
            "includeExternal: true",
            "digestTags: true",
        ]);
        (source, target, kind, rest).prop_map(|(source, target, kind, rest)| {
            format!("- source: \"{source}\"\n  target: \"{target}\"\n  type: {kind}\n  {rest}\n")
        })
    }

    fn entry() -> impl Strategy<Value = String> {
        let name = one_of(&["go", "a/b", "A", ""]);
        let rest = one_of(&[
            "tags: [latest, '1.22']",
            "semver: '>= 1.22.0, < 1.23.0'",
            "semver: '!=1'",
            "tags: []",
            "semver: 1.x, maxTags: 0",
        ]);
        (name, rest).prop_map(|(name, rest)| format!("{{name: '{name}', {rest}}}"))
    }

    proptest! {
        #[test]
        fn what_is_made_of_any_configuration_of_regsync_is_valid(steps in proptest::collection::vec(step(), 1..6)) {
            let text = format!("creds:\n- {{registry: 'localhost:5000', tls: disabled, user: u, pass: hunter2}}\nsync:\n{}", steps.concat());
            let printed = regsync::import(&text).unwrap().to_string();
            prop_assert!(!printed.contains("hunter2"));
            is_valid(&printed)?;
        }

        #[test]
        fn what_is_made_of_any_image_sync_is_valid(
            entries in proptest::collection::vec(entry(), 1..6),
            registry in one_of(&["t.io", "t.io/org", "localhost:5000", "::"]),
            schedule in one_of(&["@every 1h", "0 2 * * *", "@reboot", "nonsense"]),
        ) {
            let text = format!(
                "apiVersion: portager.portager.io/v1alpha1\nkind: ImageSync\nmetadata: {{name: a-name, namespace: n}}\n\
                 spec: {{schedule: '{schedule}', source: {{registry: cgr.dev/org}}, images: [{}],\n\
                 destination: {{registry: '{registry}', repositoryPrefix: mirror, auth: {{method: ecr}}}}}}",
                entries.join(", ")
            );
            is_valid(&portager::import(&text).unwrap().to_string())?;
        }
    }

    #[test]
    fn schedules_are_read_as_robfig_cron_reads_them() {
        for (text, interval, schedule, zone) in [
            ("0 */6 * * *", None, Some("0 */6 * * *"), None),
            (" 15  01 * * ? ", None, Some("15 01 * * *"), None),
            ("@every 1h30m", Some("1h30m"), None, None),
            ("@daily", None, Some("0 0 * * *"), None),
            ("CRON_TZ=Asia/Tokyo 0 6 * * *", None, Some("0 6 * * *"), Some("Asia/Tokyo")),
        ] {
            let times = Times::of_cron(text).unwrap();
            let found = (times.interval.as_deref(), times.schedule.as_deref(), times.time_zone.as_deref());
            assert_eq!(found, (interval, schedule, zone), "{text}");
        }
        assert!(Times::of_cron("@reboot").is_err());
    }
}
