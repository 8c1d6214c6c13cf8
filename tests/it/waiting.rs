//! Tools that wait for an object: Helm, which asks kstatus, and kubectl, which reads a condition. They return when the
//! work is done, not before, and do not wait for what only a change of the spec can help.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::{
    Process,
    images::Image,
    proxy::{Action, Gate, Matcher, Proxy, Route},
};

use crate::support::Place;

/// A chart with one `ImageMirror` in it, and the Helm that installs it.
struct Chart {
    place: Place,
    directory: tempfile::TempDir,
    /// What Helm says.
    log: std::path::PathBuf,
}

impl Chart {
    async fn new(test: &str) -> Result<Self> {
        let place = Place::new(test).await?;
        let directory = tempfile::tempdir()?;
        std::fs::create_dir(directory.path().join("templates"))?;
        let metadata = json!({"apiVersion": "v2", "name": "images", "version": "1.0.0"});
        std::fs::write(directory.path().join("Chart.yaml"), metadata.to_string())?;
        let log = place.env.log("helm");
        Ok(Self { place, directory, log })
    }

    /// Starts `helm upgrade --install --wait` with this spec.
    fn install(&self, spec: &Value, timeout: &str) -> Result<Process> {
        let object = json!({
            "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": "m"}, "spec": spec,
        });
        std::fs::write(self.directory.path().join("templates/m.yaml"), serde_json::to_string_pretty(&object)?)?;
        let mut helm = Command::new(self.place.env.tools.join("helm"));
        helm.args(["upgrade", "--install", "images"]).arg(self.directory.path()).args([
            "--kubeconfig",
            self.place.env.kubeconfig.to_str().context("a path that is not UTF-8")?,
            "--namespace",
            &self.place.namespace,
            "--wait=watcher",
            "--timeout",
            timeout,
        ]);
        Process::spawn("helm", helm, &self.log)
    }

    /// Waits for Helm's end: whether it went well, and what it said.
    async fn end(&self, mut helm: Process) -> Result<(bool, String)> {
        let status = helm.wait().await?;
        Ok((status.success(), std::fs::read_to_string(&self.log)?))
    }
}

#[tokio::test]
async fn helm_returns_when_the_images_are_there_and_not_before() -> Result<()> {
    let chart = Chart::new("helm-wait").await?;
    let place = &chart.place;
    let _operator = place.operator()?;
    for (seed, tag) in [(1, "1"), (2, "2")] {
        let image = Image::single(seed, &[1000]);
        place.push(&place.env.source, "agent", tag, &image).await?;
        // The install first, the upgrade then.
        let source = Proxy::to(place.env, &place.env.source).start().await?;
        place.pull_secret("pull", &[source.registry()]).await?;
        let gate = Gate::new();
        source.rule(Matcher::new().route(Route::Blob), Action::Gate(gate.clone()));
        let mut helm = chart.install(&place.spec(source.registry(), &place.env.target, &[("agent", &[tag])]), "60s")?;
        gate.arrived(1).await?;
        place.until("m", "progress to be written", |status| status.progress.is_some()).await?;
        ensure!(helm.is_running()?, "Helm came back while the image was on its way");
        gate.open();
        let (well, said) = chart.end(helm).await?;
        ensure!(well, "{said}");
        ensure!(
            place.holds(&place.env.target, "agent", tag, &image).await?,
            "Helm came back before the image was there"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_failure_that_is_retried_is_waited_for_and_a_wrong_spec_is_not() -> Result<()> {
    let chart = Chart::new("helm-fails").await?;
    let place = &chart.place;
    let _operator = place.operator()?;
    let image = Image::single(1, &[1000]);
    let helm = chart.install(&place.spec(&place.env.source, &place.env.target, &[("agent", &["1"])]), "60s")?;
    place.until_reason("m", "SourceNotFound").await?;
    place.push(&place.env.source, "agent", "1", &image).await?;
    place.request("m").await?;
    let (well, said) = chart.end(helm).await?;
    ensure!(well && place.holds(&place.env.target, "agent", "1", &image).await?, "{said}");

    let mut twice = place.spec(&place.env.source, &place.env.target, &[("a/agent", &["1"]), ("b/agent", &["1"])]);
    twice["target"]["repository"] = json!(format!("{}/one", place.prefix));
    let (well, said) = chart.end(chart.install(&twice, "10m")?).await?;
    ensure!(!well && said.contains("Failed"), "Helm did not see that only a change of the spec helps: {said}");
    place.until_reason("m", "InvalidSpec").await?;
    Ok(())
}
