//! `testenv demo`, the program behind `make demo`: a real Kubernetes API and two real registries, three images mirrored
//! by the operator under its own permissions, a moved tag followed, a lost one restored. Each step is shown, and each
//! is checked: what does not come out as said is an error.

mod images;
mod operator;
mod proof;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::images::Tagged;
use self::operator::Operator;
use self::proof::Sides;
use self::watch::{Watch, handled, ready};
use crate::client::Client;
use crate::commands::Commands;
use crate::controlplane::Reach;
use crate::env::Env;
use crate::forwarder::Forwarder;
use crate::registry::Registry;
use crate::supervisor::{Parts, session};
use crate::terminal::{self, output, say, step};
use crate::token::TokenOptions;
use crate::tools;

/// Of the line to the source.
const BYTES_PER_SECOND: u64 = 8_000_000;
/// What the registries and the token server are called. Crane takes no token from a server that is named by a private
/// address.
const HOST: &str = "localhost";
/// For a run of the operator; the first takes six seconds.
const SYNC_DEADLINE: Duration = Duration::from_mins(2);

const SAMPLE: &str = "config/samples/datadog.yaml";
const CRD: &str = "crds/imagemirrors.imagemirror.dev.yaml";
const CHART: &str = "helm template imagemirror charts/imagemirror --namespace imagemirror-system \
                     --kube-version 1.34.4 --show-only templates/serviceaccount.yaml --show-only templates/rbac.yaml";
const ANNOTATE: &str = "kubectl -n monitoring annotate imagemirror.imagemirror.dev/datadog --overwrite \
                        imagemirror.dev/requestedAt=";

/// What to show.
#[derive(Debug)]
pub struct Options {
    /// The operator.
    pub binary: PathBuf,
    /// Leave everything running until Ctrl-C.
    pub keep: bool,
}

/// Runs the demo and gives the exit code.
pub fn run(options: &Options) -> Result<u8> {
    let binary = options.binary.canonicalize().ok().filter(|path| path.is_file());
    let binary = binary.with_context(|| format!("no operator at {}: `make release`", options.binary.display()))?;
    let kept = AtomicBool::new(false);
    let code = session(async |run_dir: &Path| {
        play(&binary, run_dir, options.keep.then_some(&kept)).await?;
        Ok(0)
    })?;
    match code {
        0 => Ok(0),
        _ if kept.into_inner() => {
            say("\nEverything is stopped.");
            Ok(0)
        }
        _ => {
            say("\nInterrupted; everything is stopped.");
            Ok(code)
        }
    }
}

/// Everything that runs, but the operator.
struct Scene {
    parts: Parts,
    commands: Commands,
    _line: Forwarder,
    /// At the slow line's address.
    source: Registry,
    target: Registry,
    images: [Tagged; 3],
}

async fn play(binary: &Path, run_dir: &Path, keep: Option<&AtomicBool>) -> Result<()> {
    say("ImageMirror: three images, from a registry with a password to another one, under a real Kubernetes API.");
    let tools = tools::find_all().await?;
    let images = images::first().await?;
    let rebuilt = images::rebuilt_agent().await?;
    // What had to be built is of the first time alone.
    let started = Instant::now();

    step(1, "Start Kubernetes and two registries", "All of them real, on free ports of 127.0.0.1, stopped at the end.");
    let tokens = TokenOptions { host: HOST.to_owned(), ..Default::default() };
    let parts = Parts::start(&tools, run_dir, tokens, Reach::Loopback).await?;
    parts.env.save()?;
    let line = Forwarder::to(&parts.env.source.host).bytes_per_second(BYTES_PER_SECOND).start().await?;
    let (source, target) = (named(&parts.env.source, &line.host())?, named(&parts.env.target, &parts.env.target.host)?);
    let commands = Commands::new(&parts.env, "demo", &[&source, &target])?;
    let scene = Scene { parts, commands, _line: line, source, target, images };
    scene.commands.install_plugin(binary)?;
    scene.introduce(started.elapsed()).await?;

    step(
        2,
        "Push three images to the source",
        "Real programs for linux/amd64 and linux/arm64; pushed without the slow line.",
    );
    for tagged in &scene.images {
        tagged.push(scene.env()).await?;
    }

    scene.install().await?;
    let mut operator = scene.start_operator(binary).await?;
    let pid = operator.pid();
    tokio::select! {
        shown = scene.show(&rebuilt, pid) => shown?,
        status = operator.ended() => bail!("the operator ended by itself ({})", status?),
    }
    say(&format!("\nDone: everything came out as it should, in {} s.", started.elapsed().as_secs()));
    if let Some(kept) = keep {
        kept.store(true, Ordering::Relaxed);
        scene.invite(&operator.log);
        bail!("the operator ended by itself ({})", operator.ended().await?);
    }
    operator.stop().await
}

impl Scene {
    fn env(&self) -> &Env {
        &self.parts.env
    }

    async fn introduce(&self, took: Duration) -> Result<()> {
        self.commands.show("kubectl version").await?;
        output(&format!("source   {}   TLS, htpasswd; behind a line of 8 MB/s", self.source.host));
        output(&format!("target   {}   TLS, bearer tokens from a token server", self.target.host));
        output(&format!("ready in {}.{} s", took.as_secs(), took.subsec_millis() / 100));
        Ok(())
    }

    /// The CRD, the permissions, the Secrets.
    async fn install(&self) -> Result<()> {
        let commands = &self.commands;
        step(
            3,
            "Install the CRD and the permissions",
            "Those of the chart, and no more: the operator is not an administrator.",
        );
        commands.show(&format!("kubectl apply -f {CRD}")).await?;
        commands.quiet(&format!("kubectl wait --for=condition=Established --timeout=30s -f {CRD}")).await?;
        commands.show("kubectl create namespace imagemirror-system").await?;
        commands.announce(&format!("{CHART} | kubectl apply -f -"));
        commands.write("rbac.yaml", &commands.quiet(CHART).await?)?;
        output(&commands.quiet("kubectl apply -f rbac.yaml").await?);

        step(
            4,
            "Create the Secrets that the sample names",
            "A password for each registry, and the CA that signed their certificates.",
        );
        commands.show("kubectl create namespace monitoring").await?;
        for (name, registry) in [("gcr", &self.source), ("registry-push", &self.target)] {
            let username = registry.username.as_deref().context("a registry without a user")?;
            let password = registry.password.as_deref().context("a registry without a password")?;
            let host = &registry.host;
            commands
                .show(&format!(
                    "kubectl -n monitoring create secret docker-registry {name} --docker-server={host} \
                     --docker-username={username} --docker-password={password}"
                ))
                .await?;
        }
        commands.show("kubectl -n monitoring create secret generic registry-ca --from-file=ca.crt").await
    }

    async fn start_operator(&self, binary: &Path) -> Result<Operator> {
        step(
            5,
            "Run the operator",
            "With the token of its own ServiceAccount, so that a missing permission would show.",
        );
        // The default of an hour may be too short for somebody who keeps the demo running.
        let create = "kubectl -n imagemirror-system create token imagemirror --duration=24h";
        self.commands.announce(&format!("{create}   # into operator.kubeconfig"));
        let token = self.commands.quiet(create).await?;
        Operator::start(self.env(), &self.commands, binary, &token).await
    }

    /// What the operator does.
    async fn show(&self, rebuilt: &Tagged, operator: i32) -> Result<()> {
        let sides = Sides { commands: &self.commands, source: &self.source.host, target: &self.target.host };
        let [agent, _, lost] = &self.images;

        step(
            6,
            "Apply the ImageMirror and watch it",
            &format!("{SAMPLE} with the hosts of this run, nothing else changed."),
        );
        self.commands.write("datadog.yaml", &self.sample()?)?;
        self.commands.show("kubectl apply -f datadog.yaml").await?;
        let mut watch = Watch::start(&self.commands)?;
        let is_synced = |mirror: &serde_json::Value| ready(mirror) == "True" && mirror["status"]["synced"] == "3/3";
        watch.until("the object is Ready with 3/3 images", SYNC_DEADLINE, is_synced).await?;
        output(&summary(&watch.mirror));

        step(
            7,
            "Compare both registries",
            "With crane, which shares no code with the operator: every index and every platform.",
        );
        sides.begin(agent);
        for tagged in &self.images {
            sides.compare(tagged).await?;
        }
        for tagged in &self.images {
            sides.pull(tagged).await?;
        }
        output("every byte is as it was pushed");

        step(
            8,
            "Move a tag at the source",
            "A rebuilt agent under the same tag. An annotation asks for a look before the hour is over.",
        );
        ensure!(rebuilt.image.digest() != agent.image.digest(), "the rebuilt agent is the same");
        rebuilt.push(self.env()).await?;
        self.ask(&mut watch, "the-tag-has-moved").await?;
        output(&summary(&watch.mirror));
        sides.compare(rebuilt).await?;

        step(9, "Delete a tag at the target", "The same annotation brings it back.");
        let (target, reference) = (&self.target.host, lost.at_target());
        self.commands.show(&format!("crane delete {target}/{reference}")).await?;
        let client = Client::new(self.env(), &self.target)?;
        let left = client.digest_of(&format!("datadog/{}", lost.name), lost.tag).await?;
        ensure!(left.is_none(), "{reference} is still at the target after its deletion");
        output(&format!("{reference} is gone"));
        self.ask(&mut watch, "the-tag-is-lost").await?;
        output(&summary(&watch.mirror));
        sides.compare(lost).await?;

        self.show_plugin(&sides).await?;

        say("\n      And the operator itself:");
        operator::check_memory(operator)
    }

    /// The same by other means.
    async fn show_plugin(&self, sides: &Sides<'_>) -> Result<()> {
        step(
            10,
            "Do the same with the kubectl plugin",
            "It is the same program under the name kubectl-imagemirror. The operator image was rebuilt, too.",
        );
        let rebuilt = images::rebuilt_operator();
        rebuilt.push(self.env()).await?;
        for (command, code) in
            [("diff datadog", 4), ("sync datadog --wait", 0), ("list", 0), ("status datadog", 0), ("diff datadog", 0)]
        {
            self.commands.show_all(&format!("kubectl imagemirror {command} -n monitoring"), code).await?;
        }
        sides.compare(&rebuilt).await
    }

    /// Sets the annotation and waits until the status says that it was seen to.
    async fn ask(&self, watch: &mut Watch, token: &str) -> Result<()> {
        self.commands.show(&format!("{ANNOTATE}{token}")).await?;
        let what = format!("status.lastHandledReconcileAt is {token} and the object Ready");
        watch.until(&what, SYNC_DEADLINE, |mirror| handled(mirror, token)).await?;
        output(&format!("status.lastHandledReconcileAt: {token}"));
        Ok(())
    }

    /// The sample with this run's registries. Its certSecretRef names the Secret of step 4 already.
    fn sample(&self) -> Result<String> {
        let sample = std::fs::read_to_string(self.commands.dir.join(SAMPLE)).context("read the sample")?;
        Ok(sample.replace("gcr.io", &self.source.host).replace("registry.example.com", &self.target.host))
    }

    fn invite(&self, log: &Path) {
        let target = &self.target.host;
        let reference = self.images[1].at_target();
        let person = |line: &str| self.commands.for_a_person(line);
        say(&format!("\nEverything goes on until Ctrl-C.\n\n  kubeconfig         {}", self.env().kubeconfig.display()));
        say(&format!("  operator's log     {}\n", log.display()));
        say(&format!(
            "Delete an image at the target, ask for a look, see it come back:\n\n{}\n",
            person(&format!("crane delete {target}/{reference}"))
        ));
        say(&format!("{}\"$(date +%s)\"\n", person(ANNOTATE)));
        say(&person("kubectl -n monitoring get imagemirror.imagemirror.dev/datadog -o wide --watch"));
    }
}

/// The registry by its name instead of its address; `address` is where it is reached.
fn named(registry: &Registry, address: &str) -> Result<Registry> {
    let (_, port) = address.rsplit_once(':').context("an address without a port")?;
    Ok(registry.at(&format!("{HOST}:{port}")))
}

/// What the last run moved, in words.
fn summary(mirror: &serde_json::Value) -> String {
    let last = &mirror["status"]["lastSync"];
    let number = |field: &str| last[field].as_u64().unwrap_or_default();
    format!(
        "status.lastSync: {} MB in {} blobs sent, {} mounted from another repository, {} were there",
        terminal::megabytes(number("bytesCopied")),
        number("blobsCopied"),
        number("blobsMounted"),
        number("blobsPresent"),
    )
}
