//! `imagemirror plan -f FILE…`: what a sync would do and why. Nothing is written.

use std::fmt::Write as _;

use serde::Serialize;

use super::{
    Failure,
    mirrors::{MirrorArguments, Mirrors, Output},
    print_json, runtime, signals,
};
use crate::{
    plan::Action,
    registry::{Client, ClientOptions},
    sync::{ImagePreview, Preview, preview},
};

#[derive(Serialize)]
struct Outcome {
    namespace: String,
    name: String,
    #[serde(flatten)]
    preview: Preview,
}

pub(super) fn run(arguments: &MirrorArguments) -> Result<(), Failure> {
    let mirrors = Mirrors::of(arguments)?;
    runtime()?.block_on(plan_all(&mirrors, arguments.output))
}

async fn plan_all(mirrors: &Mirrors, output: Output) -> Result<(), Failure> {
    let cancel = signals();
    let client = Client::new(ClientOptions::default());
    mirrors.say_credentials();
    let mut outcomes = Vec::new();
    for mirror in &mirrors.validated {
        let (request, registries) = mirrors.request(mirror, &client, &cancel).await?;
        let preview = preview(&client, &request, &registries, &cancel).await.ok_or(Failure::Interrupted)?;
        outcomes.push(Outcome { namespace: mirror.namespace.clone(), name: mirror.name.clone(), preview });
    }
    match output {
        Output::Text => print!("{}", text(&outcomes)),
        Output::Json => print_json(&serde_json::json!({ "mirrors": outcomes }))?,
    }
    let mut images = outcomes.iter().flat_map(|outcome| &outcome.preview.images);
    if images.any(|image| image.failure.is_some()) {
        return Err(Failure::Reported);
    }
    if outcomes.iter().any(|outcome| outcome.preview.writes().next().is_some()) { Err(Failure::Work) } else { Ok(()) }
}

fn text(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for Outcome { name, preview, .. } in outcomes {
        for image in &preview.images {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}", line(image));
        }
        let (count, total) = (preview.writes().count(), preview.images.len());
        let bytes: u64 = preview.images.iter().map(|image| image.bytes).sum();
        let _ = writeln!(text, "{name}: {count} of {total} tags to write, {bytes} bytes to copy");
    }
    text
}

fn line(image: &ImagePreview) -> String {
    let target = format!("{} -> {}", image.source, image.target);
    if let Some(failure) = &image.failure {
        return format!("fail       {target}: {}: {}", failure.reason, failure.message);
    }
    let word = match image.action {
        Some(Action::Copy) => "copy",
        Some(Action::Update) => "update",
        Some(Action::Restore) => "restore",
        Some(Action::Keep) => "keep",
        Some(Action::Leave) => "leave",
        Some(Action::Unchanged) | None => "unchanged",
    };
    let bytes =
        if image.action.is_some_and(Action::writes) { format!(", {} bytes", image.bytes) } else { String::new() };
    format!("{word:<10} {target}: {}{bytes}", image.why)
}
