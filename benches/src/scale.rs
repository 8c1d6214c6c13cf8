//! `make scale`: an operator with 1,000 `ImageMirror` objects of 50 tags each, and with one object of 500 tags and of
//! 440 MB, against a real API server and two real registries. Prints what it took and writes `benches/SCALE.md`.

mod cluster;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bytes::Bytes;
use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use testenv::hostile::{Hostile, Threat};
use testenv::{Client, Content, Image, RegistryOptions, RegistryServer};

use self::cluster::{Cluster, Operator, Writes, existing};
use crate::machine;
use crate::workload::{Kind, Workload};

const RUNS: &str = "imagemirror_sync_duration_seconds_count";
const READY: &str = "imagemirror_condition{";
const DEADLINE: Duration = Duration::from_mins(15);

#[derive(Args)]
pub(crate) struct Options {
    /// The program of `ImageMirror`.
    #[arg(long)]
    binary: PathBuf,
    /// How many objects, in ten namespaces.
    #[arg(long, default_value_t = 1000)]
    mirrors: usize,
    /// How many tags each of them names.
    #[arg(long, default_value_t = 50)]
    tags: usize,
    /// The file that is written.
    #[arg(long)]
    results: PathBuf,
}

/// A line of the table.
struct Row {
    what: String,
    measured: String,
    goal: &'static str,
}

fn row(what: impl Into<String>, measured: String, goal: &'static str) -> Row {
    Row { what: what.into(), measured, goal }
}

pub(crate) async fn run(options: &Options) -> Result<()> {
    let binary = existing(&options.binary)?;
    let cluster = Cluster::prepare()?;
    let scale = Scale { options, binary, cluster };
    let mut rows = scale.alone().await?;
    rows.extend(scale.beside_hostile_ones().await?);
    rows.extend(scale.many().await?);
    let text = scale.report(&rows)?;
    println!("{text}");
    std::fs::write(&options.results, text)?;
    eprintln!("scale: {} is written", options.results.display());
    Ok(())
}

struct Scale<'a> {
    options: &'a Options,
    binary: PathBuf,
    cluster: Cluster,
}

/// The two registries of one measurement.
struct Pair {
    source: RegistryServer,
    target: RegistryServer,
}

impl Scale<'_> {
    async fn pair(&self, name: &str) -> Result<Pair> {
        let env = self.cluster.env();
        let registry =
            |side: &str| RegistryOptions { name: format!("{name}-{side}"), disk: true, ..RegistryOptions::default() };
        let source = RegistryServer::start(env, registry("source")).await?;
        Ok(Pair { source, target: RegistryServer::start(env, registry("target")).await? })
    }

    fn operator(&self, pair: &Pair) -> Result<Operator> {
        Operator::start(&self.cluster, &self.binary, &[pair.source.host(), pair.target.host()])
    }

    /// One object, as it is for a small installation.
    async fn alone(&self) -> Result<Vec<Row>> {
        self.cluster.kubectl(&["create", "namespace", "alone"])?;
        let mut rows = Vec::new();
        for (kind, name) in [(Kind::W1, "w1"), (Kind::W2, "w2")] {
            eprintln!("scale: {} with the operator", kind.name());
            let pair = self.pair(name).await?;
            let workload = kind.fill(&Client::new(self.cluster.env(), pair.source.registry())?).await?;
            let operator = self.operator(&pair)?;
            operator.until("imagemirror_leader", 1.0, DEADLINE).await?;
            let object = [("alone".to_owned(), name.to_owned(), spec_of(&workload, &pair))];
            self.cluster.create(&object).await?;
            let seconds = operator.until(&ready("alone", name), 1.0, DEADLINE).await?;
            let (_, peak) = operator.memory()?;
            let status = self.cluster.get("alone", name).await?["status"].to_string().len();
            let tags = workload.tags.len();
            rows.push(row(
                format!("{}: `kubectl apply` → Ready", kind.name()),
                format!("{seconds:.2} s"),
                if kind == Kind::W1 { "2.2 s (0.8 of the fastest operator known)" } else { "" },
            ));
            rows.push(row(format!("{}: peak memory", kind.name()), format!("{peak:.0} MiB"), "40 MiB"));
            rows.push(row(
                format!("{}: size of the status, {tags} tags", kind.name()),
                format!("{:.1} KiB", of(status) / 1024.0),
                "64 KiB",
            ));
            self.cluster.kubectl(&["delete", "imagemirrors.imagemirror.dev", "-n", "alone", "--all"])?;
            operator.stop().await?;
        }
        Ok(rows)
    }

    /// W1 once more, with a registry beside it that wants all our memory and time, in two objects for each threat.
    async fn beside_hostile_ones(&self) -> Result<Vec<Row>> {
        eprintln!("scale: W1 beside hostile registries");
        self.cluster.kubectl(&["create", "namespace", "hostile"])?;
        let hostile = Hostile::start().await?;
        let pair = self.pair("beside").await?;
        let workload = Kind::W1.fill(&Client::new(self.cluster.env(), pair.source.registry())?).await?;
        let threats = [0, 1].into_iter().flat_map(|round| Threat::ALL.map(|threat| (round, threat)));
        let objects = threats.map(|(round, threat)| {
            let spec = json!({
                "target": {"registry": pair.target.host(), "repository": "hostile/{name}"},
                "registries": [{"host": hostile.host, "plainHTTP": true}],
                "images": [threat.image(&hostile.host)],
            });
            ("hostile".to_owned(), format!("{}-{round}", threat.name()), spec)
        });
        let mut seconds = Vec::new();
        let mut peaks = Vec::new();
        for objects in [Vec::new(), objects.collect()] {
            let operator = self.operator(&pair)?;
            operator.until("imagemirror_leader", 1.0, DEADLINE).await?;
            self.cluster.create(&objects).await?;
            let queued = if objects.is_empty() { 0.0 } else { 10.0 };
            operator.until("imagemirror_queue_depth", queued, DEADLINE).await?;
            let name = format!("w1-beside-{}", objects.len());
            // To another place: what the first one has copied is of no use to the second.
            let mut spec = spec_of(&workload, &pair);
            spec["target"]["repository"] = json!(format!("{name}/{{repository}}"));
            self.cluster.create(&[("alone".to_owned(), name.clone(), spec)]).await?;
            seconds.push(operator.until(&ready("alone", &name), 1.0, DEADLINE).await?);
            peaks.push(operator.memory()?.1);
            for namespace in ["alone", "hostile"] {
                self.cluster.kubectl(&["delete", "imagemirrors.imagemirror.dev", "-n", namespace, "--all"])?;
            }
            operator.stop().await?;
        }
        let (alone, beside) = (seconds[0], seconds[1]);
        Ok(vec![
            row(
                "W1 beside 28 objects of hostile registries: `kubectl apply` → Ready; alone",
                format!("{beside:.2} s; {alone:.2} s ({:.2} times)", beside / alone),
                "",
            ),
            row("the same: peak memory", format!("{:.0} MiB", peaks[1]), "96 MiB"),
        ])
    }

    /// Many objects: the first sync of all, a pass in which there is nothing to do, and a restart after which all are
    /// overdue.
    async fn many(&self) -> Result<Vec<Row>> {
        let (mirrors, tags) = (self.options.mirrors, self.options.tags);
        let count = of(mirrors);
        let pair = self.pair("many").await?;
        eprintln!("scale: filling {mirrors} repositories with {tags} tags each");
        fill(&Client::new(self.cluster.env(), pair.source.registry())?, mirrors, tags).await?;
        let objects: Vec<_> = (0..mirrors).map(|n| (namespace(n), format!("m{n}"), spec(&pair, n, tags))).collect();
        for n in 0..10 {
            self.cluster.kubectl(&["create", "namespace", &namespace(n)])?;
        }

        eprintln!("scale: the first sync");
        let operator = self.operator(&pair)?;
        operator.until("imagemirror_leader", 1.0, DEADLINE).await?;
        self.cluster.create(&objects).await?;
        let first = operator.until(RUNS, count, DEADLINE).await?;
        self.all_ready(&operator).await?;

        eprintln!("scale: a pass in which there is nothing to do");
        let began = Instant::now();
        let request = json!({"metadata": {"annotations": {"imagemirror.dev/requestedAt": "scale"}}});
        self.cluster.patch(&objects, "", &request).await?;
        operator.until(RUNS, 2.0 * count, DEADLINE).await?;
        let requested = began.elapsed().as_secs_f64();
        let (resident, peak) = operator.memory()?;
        operator.kill().await?;

        eprintln!("scale: a restart, and everything is overdue");
        let overdue = json!({"status": {"lastSync": {"finishedAt": "2020-01-01T00:00:00Z"}}});
        self.cluster.patch(&objects, "/status", &overdue).await?;
        let before = self.cluster.writes().await?;
        let began = Instant::now();
        let operator = self.operator(&pair)?;
        operator.until(RUNS, 1.0, DEADLINE).await?;
        let to_first = began.elapsed().as_secs_f64();
        operator.until(RUNS, count, DEADLINE).await?;
        let caught_up = began.elapsed().as_secs_f64();
        let after = self.cluster.writes().await?;
        self.all_ready(&operator).await?;
        let (_, peak_after) = operator.memory()?;
        operator.stop().await?;

        let pass = caught_up - to_first;
        let Writes { statuses, others } = after;
        let beside = (statuses - before.statuses - count + others - before.others) / caught_up;
        let all = mirrors * tags;
        Ok(vec![
            row(format!("{mirrors} objects, {all} tags: the first sync"), format!("{first:.0} s"), ""),
            row("a pass in which there is nothing to do", format!("{pass:.1} s"), "60 s"),
            row("the same, of all objects at once by `requestedAt`", format!("{requested:.1} s"), "60 s"),
            row("SIGKILL and restart → the first run", format!("{to_first:.1} s"), "30 s"),
            row("SIGKILL and restart → all caught up", format!("{caught_up:.1} s"), "30 s and one pass"),
            row("writes to the API a second, beside one status a run", format!("{beside:.2}"), "5"),
            row("memory after two passes; peak", format!("{resident:.0} MiB; {peak:.0} MiB"), "160 MiB"),
            row("peak memory after the restart", format!("{peak_after:.0} MiB"), "160 MiB"),
        ])
    }

    /// What counts runs does not know how they ended.
    async fn all_ready(&self, operator: &Operator) -> Result<()> {
        let lines: Vec<_> = (0..self.options.mirrors).map(|n| ready(&namespace(n), &format!("m{n}"))).collect();
        for line in lines.iter().step_by(lines.len().div_ceil(50)) {
            ensure!(operator.metric(line).await? >= 1.0, "an object is not ready: {line}");
        }
        let failed = operator.metric("imagemirror_images{").await?;
        let wanted = of(self.options.mirrors * self.options.tags);
        ensure!((failed - wanted).abs() < 0.5, "{failed} images are counted, {wanted} are wanted");
        Ok(())
    }

    fn report(&self, rows: &[Row]) -> Result<String> {
        let mut text = include_str!("scale.md").replace("{machine}", &machine::facts(&self.cluster.env().run_dir)?);
        text.push_str("\n| | measured | goal |\n|---|---|---|\n");
        for Row { what, measured, goal } in rows {
            writeln!(text, "| {what} | {measured} | {goal} |")?;
        }
        Ok(text)
    }
}

fn namespace(n: usize) -> String {
    format!("scale-{}", n % 10)
}

fn ready(namespace: &str, name: &str) -> String {
    format!(r#"{READY}namespace="{namespace}",name="{name}",type="Ready",status="True"}}"#)
}

fn tag(n: usize) -> String {
    format!("1.{n}.0")
}

fn repository(n: usize) -> String {
    format!("team-{}/service-{n}", n % 10)
}

fn spec(pair: &Pair, n: usize, tags: usize) -> Value {
    let tags: Vec<String> = (0..tags).map(tag).collect();
    json!({
        "target": {"registry": pair.target.host(), "repository": "mirror/{repository}"},
        "images": [{"source": format!("{}/{}", pair.source.host(), repository(n)), "tags": tags}],
    })
}

fn spec_of(workload: &Workload, pair: &Pair) -> Value {
    let image = |(repository, tags): (&str, Vec<&str>)| json!({"source": format!("{}/{repository}", pair.source.host()), "tags": tags});
    let images: Vec<Value> = workload.repositories().into_iter().map(image).collect();
    json!({"target": {"registry": pair.target.host(), "repository": "{repository}"}, "images": images})
}

/// So many repositories with one small image each, under so many tags of different digests.
async fn fill(client: &Client, repositories: usize, tags: usize) -> Result<()> {
    let pushes = (0..repositories).map(async |n| {
        let name = repository(n);
        let image = Image::single(n as u64, &[500]);
        for blob in &image.blobs {
            client.put_blob(&name, blob).await?;
        }
        let mut manifest: Value = serde_json::from_slice(&image.root.bytes)?;
        for number in 0..tags {
            manifest["annotations"] = json!({"org.opencontainers.image.version": tag(number)});
            let content = Content::new(&image.root.media_type, Bytes::from(serde_json::to_vec(&manifest)?));
            client.put_manifest(&name, &tag(number), &content).await?;
        }
        anyhow::Ok(())
    });
    stream::iter(pushes).buffer_unordered(8).try_collect().await
}

#[allow(clippy::cast_precision_loss, reason = "counts of a benchmark")]
fn of(count: usize) -> f64 {
    count as f64
}
