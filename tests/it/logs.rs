//! What a real operator logs as JSON: every line of a run says whose it is, and only what has changed is worth one.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::{
    Image, Proxy,
    proxy::{Action, Close, Matcher, Route},
};

use crate::support::{Operator, Place, eventually};

const CHANGED: &str = "the object's state has changed";

/// The lines about an object, oldest first.
fn lines(operator: &Operator, object: &str) -> Result<Vec<Value>> {
    let logged = operator.logged()?;
    // The last line may be under way.
    let whole = logged.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines = whole.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    Ok(lines.into_iter().filter(|line| spans(line).any(|span| span["object"] == object)).collect())
}

fn spans(line: &Value) -> impl Iterator<Item = &Value> {
    line["spans"].as_array().into_iter().flatten()
}

/// What a line is about: level, text, and what tells it from others of its kind.
fn told(line: &Value) -> [String; 4] {
    let about = if line["message"] == CHANGED { ["ready", "reason"] } else { ["source", "tag"] };
    [&line["level"], &line["message"], &line[about[0]], &line[about[1]]]
        .map(|value| value.as_str().unwrap_or_default().to_owned())
}

fn worth_a_line(lines: &[Value]) -> Vec<[String; 4]> {
    lines.iter().filter(|line| line["level"] != "DEBUG").map(told).collect()
}

#[tokio::test]
async fn a_run_logs_one_line_a_transition_and_one_for_each_image_that_was_copied_or_failed() -> Result<()> {
    let place = Place::new("log").await?;
    let (new, same) = (Image::single(63, &[1000]), Image::single(64, &[1000]));
    for (registry, name, image) in
        [(&place.env.source, "new", &new), (&place.env.source, "same", &same), (&place.env.target, "same", &same)]
    {
        place.push(registry, name, "1", image).await?;
    }
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    let of_new = Matcher::new().method("GET").route(Route::Manifest).repository(&place.repository("new"));
    source.rule(of_new.times(1), Action::CloseBefore(Close::Reset));
    place.pull_secret("pull", &[source.registry()]).await?;
    let spec = |names: &[&'static str]| {
        let images: Vec<(&str, &[&str])> = names.iter().map(|name| (*name, &["1"][..])).collect();
        place.spec(source.registry(), &place.env.target, &images)
    };
    let operator = place.operator()?;
    let object = format!("{}/m", place.namespace);
    place.apply("m", &spec(&["new", "gone", "same"])).await?;
    let changes_to = async |reason: &str| {
        let is_it = |line: &Value| line["message"] == CHANGED && line["reason"] == reason;
        eventually(reason, || async { Ok(lines(&operator, &object)?.iter().any(is_it)) }).await
    };
    changes_to("PartialFailure").await?;
    let first = lines(&operator, &object)?;
    let image = |name: &str| format!("{}/{}", source.host(), place.repository(name));
    let mut found = worth_a_line(&first);
    // The two images are looked at side by side.
    found[1..3].sort();
    let expected = [
        ["INFO", CHANGED, "Unknown", "Progressing"],
        ["INFO", "image copied", &image("new"), "1"],
        ["WARN", "image failed", &image("gone"), "1"],
        ["INFO", CHANGED, "False", "PartialFailure"],
    ];
    ensure!(found == expected, "{found:#?}");

    let run = |line: &Value| spans(line).find_map(|span| span["run"].as_str().map(ToOwned::to_owned));
    let number = first.iter().find_map(run).context("no line names its run")?;
    for line in &first {
        let is_of_run = line["message"] != CHANGED || line["reason"] == "PartialFailure";
        ensure!(!is_of_run || run(line).as_ref() == Some(&number), "{line} is of {number}");
    }
    let repeated = first.iter().find(|line| line["message"] == "repeating a request").context("no repetition")?;
    ensure!(repeated["host"] == source.host() && repeated["level"] == "DEBUG", "{repeated}");

    // Nothing is copied and nothing fails.
    place.apply("m", &spec(&["new", "same"])).await?;
    changes_to("Succeeded").await?;
    let all = lines(&operator, &object)?;
    let found = worth_a_line(&all[first.len()..]);
    let expected = json!([["INFO", CHANGED, "Unknown", "Progressing"], ["INFO", CHANGED, "True", "Succeeded"]]);
    ensure!(json!(found) == expected, "{found:#?}");
    ensure!(all.iter().filter_map(run).any(|other| other != number), "two runs have one name");
    Ok(())
}

#[tokio::test]
async fn the_level_changes_with_the_configuration_file_and_a_wrong_one_changes_nothing() -> Result<()> {
    let place = Place::new("log-level").await?;
    let config = |level: &str| {
        let networks = json!({"allow": ["127.0.0.0/8"]});
        let timing = json!({"configPoll": "50ms"});
        json!({"watchNamespaces": [place.namespace], "timing": timing, "networks": networks, "log": {"level": level}})
    };
    let operator = place.operator_of(&config("warn"), &[])?;
    // As a kubelet does: what is there is replaced, never half written.
    let write = |text: &str| {
        let new = operator.config.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(&new, &operator.config)
    };
    let says = async |what: &str| eventually(what, || async { Ok(operator.logged()?.contains(what)) }).await;
    place.push(&place.env.source, "agent", "1", &Image::single(65, &[1000])).await?;
    place.apply("m", &place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])])).await?;
    place.until_ready("m").await?;
    let logged = operator.logged()?;
    ensure!(!logged.contains("INFO") && !logged.contains("DEBUG"), "{logged}");

    write(&config("debug").to_string())?;
    says("the log level has changed").await?;
    for (wrong, told) in
        [(config("inof").to_string(), "invalid log level"), ("log: [".into(), "configuration is wrong")]
    {
        write(&wrong)?;
        says(told).await?;
    }
    std::fs::remove_file(&operator.config)?;
    says("cannot be read").await?;
    place.request("m").await?;
    says("run ended").await?;
    ensure!(operator.logged()?.contains("\"level\":\"DEBUG\""));

    // It goes on from there once the file is right again.
    write(&config("info").to_string())?;
    eventually("the level to change back", || async {
        Ok(operator.logged()?.matches("the log level has changed").count() == 2)
    })
    .await
}
