//! The operator as it is seen from outside: its metrics against what the registries were asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use imagemirror::api::v1alpha1::{LastSync, Summary};
use serde_json::{Value, json};
use testenv::{
    Image, Proxy, RegistryOptions, RegistryServer,
    certs::{Ca, Identity},
    proxy::{Action, CHECK_USER_AGENT, Matcher, Route},
    token::{TokenOptions, TokenServer},
};

use crate::support::{Operator, Place, eventually, free_port, golden, rendered_chart, run};

/// How many requests there were, by method and status.
type Requests = BTreeMap<(String, String), u64>;
/// Each metric's type and labels, by its whole name.
pub(crate) type Table = BTreeMap<String, (String, BTreeSet<String>)>;

/// What `/metrics` says.
struct Scrape {
    types: BTreeMap<String, String>,
    helps: BTreeMap<String, String>,
    series: Vec<Series>,
}

struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: String,
}

impl Scrape {
    async fn of(operator: &Operator) -> Result<Self> {
        Self::parse(&operator.get("/metrics").await?.1)
    }

    fn parse(text: &str) -> Result<Self> {
        let (mut types, mut helps, mut series) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|line| line.split_once(' ')) {
                helps.insert(name.to_owned(), help.to_owned());
            } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) {
                types.insert(name.to_owned(), kind.to_owned());
            } else if !line.starts_with('#') {
                let (left, value) = line.rsplit_once(' ').context("no value")?;
                let (name, labels) = left.split_once('{').unwrap_or((left, ""));
                let labels = labels.trim_end_matches('}').split("\",").filter_map(|label| label.split_once("=\""));
                let labels = labels.map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned()));
                series.push(Series { name: name.to_owned(), labels: labels.collect(), value: value.to_owned() });
            }
        }
        Ok(Self { types, helps, series })
    }

    /// The series of a metric that have these labels.
    fn all(&self, name: &str, wanted: &[(&str, &str)]) -> Vec<&Series> {
        let has =
            |found: &Series, (name, value): &(&str, &str)| found.labels.get(*name).is_some_and(|found| found == value);
        let is_it = |found: &&Series| {
            found.name.strip_prefix("imagemirror_") == Some(name) && wanted.iter().all(|label| has(found, label))
        };
        self.series.iter().filter(is_it).collect()
    }

    fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.all(name, labels).iter().filter_map(|found| found.value.parse::<u64>().ok()).sum()
    }

    fn seconds(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.all(name, labels).iter().filter_map(|found| found.value.parse::<f64>().ok()).sum()
    }

    fn table(&self) -> Table {
        let row = |(name, kind): (&String, &String)| {
            let of_it = self.series.iter().filter(|found| found.name.starts_with(name.as_str()));
            // The bound of a bucket belongs to the type.
            let labels = of_it.flat_map(|found| found.labels.keys().filter(|label| *label != "le").cloned());
            (format!("{name}{}", suffix(kind)), (kind.clone(), labels.collect()))
        };
        self.types.iter().map(row).collect()
    }

    /// The rows of the reference.
    fn described(&self) -> Result<String> {
        let mut rows = String::new();
        for (name, (kind, labels)) in self.table() {
            let help = self.helps[name.trim_end_matches(suffix(&kind))].trim_end_matches('.');
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            writeln!(rows, "| `{name}` | {kind} | {} | {help} |", labels.join(", "))?;
        }
        Ok(rows)
    }

    /// How many requests to the host of a proxy came to what.
    fn requests(&self, proxy: &Proxy) -> Requests {
        let host = proxy.host();
        let requests = self.all("registry_requests_total", &[("host", &host)]).into_iter();
        let requests = requests.filter_map(|found| {
            Some(((found.labels["method"].clone(), found.labels["code"].clone()), found.value.parse().ok()?))
        });
        requests.collect()
    }
}

/// What a metric's name has behind what it is registered by.
fn suffix(kind: &str) -> &'static str {
    match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    }
}

const REFERENCE: &str = "docs/reference/metrics.md";
const HEAD: &str = "\
# Metrics

What `/metrics` of the operator shows, in the words of its help lines. `make golden` writes this page from what a running operator
exposes. How metrics are reached, protected and bounded: [operations](../operations.md#metrics).

| metric | type | labels | meaning |
|---|---|---|---|
";

fn reference() -> Result<String> {
    Ok(std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(REFERENCE))?)
}

/// The table of the documentation.
pub(crate) fn documented() -> Result<Table> {
    let text = reference()?;
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, name, kind, labels, ..] = cells.as_slice() else { bail!("{line}") };
        let labels = labels.split(", ").filter(|label| !label.is_empty()).map(|label| label.replace('`', ""));
        Ok((name.replace('`', ""), ((*kind).to_owned(), labels.collect())))
    };
    rows.map(row).collect()
}

/// How many requests a proxy has passed on or answered.
fn passed(proxy: &Proxy) -> Requests {
    let mut passed = BTreeMap::new();
    for exchange in proxy.requests().iter().filter(|exchange| exchange.user_agent != CHECK_USER_AGENT) {
        let status = exchange.status.map_or("none".to_owned(), |status| status.to_string());
        *passed.entry((exchange.key.method.to_string(), status)).or_default() += 1;
    }
    passed
}

/// Two ways to one source, a target and its token server, each behind a proxy, and an object that has had two runs.
struct Site {
    place: Place,
    source: Proxy,
    busy: Proxy,
    target: Proxy,
    door: Proxy,
    operator: Operator,
    spec: Value,
    runs: Vec<LastSync>,
    _servers: (TokenServer, RegistryServer),
}

impl Site {
    async fn new() -> Result<Self> {
        let place = Place::new("metrics").await?;
        let env = place.env;
        let tokens = TokenServer::start(&env.ca()?, &env.log("metrics-tokens"), TokenOptions::default()).await?;
        let door = Proxy::to_tokens(env, tokens.endpoint()).start().await?;
        let auth = tokens.endpoint().at(&door.url()).auth();
        let options = RegistryOptions { name: "metrics".into(), auth, ..RegistryOptions::default() };
        let server = RegistryServer::start(env, options).await?;
        let user = tokens.endpoint().user("push").context("no user")?;
        let target = server.registry().with_credentials(&user.name, &user.password);
        let target = Proxy::to(env, &target).start().await?;
        let source = Proxy::to(env, &env.source).start().await?;
        let busy = Proxy::to(env, &env.source).start().await?;
        source.rule(Matcher::new().route(Route::Manifest), Action::set_header("RateLimit-Remaining", "76;w=21600"));
        let come_again = Action::respond(429).header("Retry-After", "1");
        busy.rule(Matcher::new().route(Route::Manifest).times(1), come_again);

        let image = Image::single(61, &[300_000, 2_000_000]);
        for (name, image) in [("one", &image), ("same-layers", &image), ("later", &Image::single(62, &[1000]))] {
            place.push(&env.source, name, "1", image).await?;
        }
        place.pull_secret("pull", &[source.registry(), busy.registry()]).await?;
        place.pull_secret("push", &[target.registry()]).await?;
        let mut spec = place.spec(source.registry(), target.registry(), &[("gone", &["1"]), ("one", &["1"])]);
        let more = place.spec(busy.registry(), target.registry(), &[("later", &["1"])]);
        for list in ["images", "registries"] {
            spec[list].as_array_mut().context(list)?.push(more[list][0].clone());
        }
        let operator = place.operator()?;
        place.apply("m", &spec).await?;
        let first = place.until_reason("m", "PartialFailure").await?;
        // Once the layers are at the target, another repository of it can have them from there.
        let like_one = spec["images"][1].to_string().replace("/one", "/same-layers");
        spec["images"].as_array_mut().context("images")?.push(serde_json::from_str(&like_one)?);
        place.apply("m", &spec).await?;
        let second = place.until("m", "the second run", |status| status.synced.as_deref() == Some("3/4")).await?;
        let runs = [first, second].into_iter().filter_map(|mirror| mirror.status?.last_sync).collect();
        Ok(Self { place, source, busy, target, door, operator, spec, runs, _servers: (tokens, server) })
    }

    fn proxies(&self) -> [&Proxy; 4] {
        [&self.source, &self.busy, &self.target, &self.door]
    }

    async fn scrape(&self) -> Result<Scrape> {
        Scrape::of(&self.operator).await
    }

    /// Bytes of blobs that the target got for a repository.
    fn sent(&self, repository: &str) -> u64 {
        let matcher = Matcher::new().route(Route::Upload).repository(&self.place.repository(repository));
        let requests = self.target.requests().into_iter();
        requests.filter(|sent| matcher.matches(&sent.key, &sent.path)).map(|sent| sent.request_bytes).sum()
    }

    async fn check_requests(&self) -> Result<()> {
        // What is under way is counted at its end.
        let counted = eventually("the counts to be those of the registries", || async {
            let scrape = self.scrape().await?;
            Ok(self.proxies().into_iter().all(|proxy| passed(proxy) == scrape.requests(proxy)))
        });
        if let Err(error) = counted.await {
            let scrape = self.scrape().await?;
            bail!("{error}: {:?}", self.proxies().map(|proxy| (passed(proxy), scrape.requests(proxy))));
        }
        let scrape = self.scrape().await?;
        for (proxy, method, code) in [
            (&self.door, "GET", "200"),
            (&self.busy, "GET", "429"),
            (&self.source, "GET", "404"),
            (&self.target, "PUT", "201"),
        ] {
            let labels = [("host", &*proxy.host()), ("method", method), ("code", code)];
            ensure!(scrape.count("registry_requests_total", &labels) > 0, "{labels:?}");
        }
        let waited = |proxy: &Proxy| scrape.seconds("registry_throttled_seconds_total", &[("host", &proxy.host())]);
        ensure!((0.5..5.0).contains(&waited(&self.busy)), "{}", waited(&self.busy));
        ensure!(waited(&self.door) < 0.1, "{}", waited(&self.door));
        ensure!(scrape.all("rate_limit_remaining", &[]).len() == 1);
        ensure!(scrape.count("rate_limit_remaining", &[("host", &self.source.host())]) == 76);
        Ok(())
    }

    async fn check_copies(&self) -> Result<()> {
        let scrape = self.scrape().await?;
        let from_source = self.sent("one") + self.sent("same-layers");
        for (from, bytes) in [(&self.source, from_source), (&self.busy, self.sent("later"))] {
            let pair = [("source_host", &*from.host()), ("target_host", &*self.target.host())];
            let counted = scrape.count("copied_bytes_total", &pair);
            ensure!(bytes > 0 && counted == bytes, "{counted} of {bytes} bytes");
        }
        let blobs = |of: fn(&LastSync) -> i64| u64::try_from(self.runs.iter().map(of).sum::<i64>());
        for (result, blobs) in [
            ("copied", blobs(|run| run.blobs_copied)?),
            ("mounted", blobs(|run| run.blobs_mounted)?),
            ("present", blobs(|run| run.blobs_present)?),
        ] {
            ensure!(scrape.count("blobs_total", &[("result", result)]) == blobs, "{result} is not {blobs}");
            ensure!(blobs > 0 || result == "present", "{result}: {:?}", self.runs);
        }
        Ok(())
    }

    async fn check_object(&self) -> Result<()> {
        let scrape = self.scrape().await?;
        let of_object = |more: &[(&'static str, &'static str)]| {
            [&[("namespace", self.place.namespace.as_str()), ("name", "m")], more].concat()
        };
        for (state, count) in [("synced", 3), ("failed", 1), ("pending", 0), ("skipped", 0)] {
            ensure!(scrape.count("images", &of_object(&[("state", state)])) == count, "{state}");
        }
        ensure!(scrape.count("condition", &of_object(&[("type", "Ready"), ("status", "False")])) == 1);
        ensure!(scrape.count("leader", &[]) == 1 && scrape.count("queue_depth", &[]) == 0);
        ensure!(scrape.count("sync_duration_seconds_count", &[]) == 2);
        let successes = scrape.all("last_success_timestamp_seconds", &[]).len();
        ensure!(successes == 0, "a run that failed was a success");
        Ok(())
    }
}

#[tokio::test]
async fn every_metric_says_what_the_registries_have_seen() -> Result<()> {
    let mut site = Site::new().await?;
    site.check_requests().await?;
    site.check_copies().await?;
    // A status can be seen a moment before it is counted.
    if eventually("the metrics of the object", || async { site.check_object().await.map(|()| true) }).await.is_err() {
        site.check_object().await?;
    }

    let images = |spec: &mut Value| Ok::<_, anyhow::Error>(spec["images"].as_array_mut().context("images")?.remove(0));
    images(&mut site.spec)?;
    site.place.apply("m", &site.spec).await?;
    site.place.until_ready("m").await?;
    // Without its rights it cannot write the status of what it is told next.
    site.place.kubectl(&["delete", "role", &format!("{}:imagemirror", site.place.namespace)])?;
    images(&mut site.spec)?;
    site.place.apply("m", &site.spec).await?;
    eventually("a reconcile to fail", || async {
        Ok(site.scrape().await?.count("reconcile_errors_total", &[("reason", "Forbidden")]) > 0)
    })
    .await?;
    let before = site.scrape().await?;
    golden(REFERENCE, &format!("{HEAD}{}", before.described()?))?;
    for Series { labels, .. } in &before.series {
        let is_of_image = |value: &String| ["one", "later", "layers", "sha256"].iter().any(|part| value.contains(part));
        ensure!(!labels.values().any(is_of_image), "{labels:?} is about an image");
    }

    // Who does not lead knows nothing of objects. What it has done stays done.
    site.place.kubectl(&["delete", "role", "imagemirror"])?;
    eventually("the lease to be lost", || async { Ok(site.scrape().await?.count("leader", &[]) == 0) }).await?;
    let after = site.scrape().await?;
    ensure!(after.series.iter().all(|found| !found.labels.contains_key("namespace")), "objects are still shown");
    for counter in ["registry_requests_total", "copied_bytes_total", "blobs_total"] {
        ensure!(before.count(counter, &[]) > 0 && after.count(counter, &[]) >= before.count(counter, &[]), "{counter}");
    }
    Ok(())
}

/// Without an operator, so that `make check-generated` sees it. Labels are known of what has been counted alone.
#[test]
fn the_reference_of_metrics_is_current() -> Result<()> {
    let (metrics, registry) = imagemirror::telemetry::metrics::Metrics::new(&std::sync::Arc::default());
    metrics.observe_status("namespace", "name", &Summary::default(), &[]);
    metrics.observe_success("namespace", "name", jiff::Timestamp::UNIX_EPOCH);
    metrics.reconcile_error("Forbidden");
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    let scrape = Scrape::parse(&text)?;
    let without_labels = |row: &str| {
        let mut cells: Vec<_> = row.split(" | ").map(ToOwned::to_owned).collect();
        cells.iter_mut().skip(2).take(1).for_each(String::clear);
        cells
    };
    let (page, described) = (reference()?, scrape.described()?);
    let rows: Vec<_> = page.lines().filter(|line| line.starts_with("| `")).map(without_labels).collect();
    let expected: Vec<_> = described.lines().map(without_labels).collect();
    ensure!(rows == expected, "{REFERENCE} is not current, run `make golden`: {rows:#?}\n{expected:#?}");
    Ok(())
}

#[tokio::test]
async fn hosts_that_tenants_name_do_not_make_series_without_end() -> Result<()> {
    let place = Place::new("metrics-hosts").await?;
    let mut spec = place.spec(&place.env.source, &place.env.target, &[]);
    // Nobody listens on the first port.
    let image = |n| json!({"source": format!("127.0.7.{n}:1/a"), "tags": ["1"], "targetTags": [format!("t{n}")]});
    spec["images"] = (1..=130).map(image).collect();
    let operator = place.operator()?;
    place.apply("m", &spec).await?;
    place.until_reason("m", "SourceUnavailable").await?;
    let scrape = Scrape::of(&operator).await?;
    let requests = scrape.all("registry_requests_total", &[]);
    let hosts: BTreeSet<_> = requests.iter().map(|found| &found.labels["host"]).collect();
    ensure!(hosts.len() == 101, "{} hosts are told apart", hosts.len());
    ensure!(scrape.count("registry_requests_total", &[("host", "other"), ("code", "error")]) >= 29);
    Ok(())
}

/// What a scrape over TLS is answered, by who trusts the authority of the tests alone.
async fn scraped(address: &str, token: Option<&str>) -> Result<(u16, String)> {
    let tls = testenv::certs::client_config(&testenv::Env::get().ca_pem)?;
    let client = reqwest::Client::builder().tls_backend_preconfigured((*tls).clone()).build()?;
    let mut request = client.get(format!("https://{address}/metrics"));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

#[tokio::test]
async fn metrics_with_authentication_are_for_those_who_may_get_them_and_over_tls_alone() -> Result<()> {
    let place = Place::new("metrics-secure").await?;
    let secure = "metrics.secure.enabled=true,metrics.secure.certSecret=x";
    let watched = format!("watchNamespaces={{{}}}", place.namespace);
    let only = ["--show-only", "templates/rbac.yaml", "--set", &watched, "--set", secure];
    let rights = rendered_chart(place.env, &place.namespace, &only)?;
    let mut apply = Command::new(place.env.tools.join("kubectl"));
    apply.arg("--kubeconfig").arg(&place.env.kubeconfig).args(["apply", "-f", "-"]);
    run(&mut apply, Some(&rights))?;
    for account in ["reader", "stranger"] {
        place.kubectl(&["create", "serviceaccount", account])?;
    }
    let role = format!("{}:reader", place.namespace);
    let reader = format!("system:serviceaccount:{}:reader", place.namespace);
    place.kubectl(&["create", "clusterrole", &role, "--verb=get", "--non-resource-url=/metrics"])?;
    place.kubectl(&["create", "clusterrolebinding", &role, "--clusterrole", &role, "--user", &reader])?;
    let may_read = || {
        let mut ask = Command::new(place.env.tools.join("kubectl"));
        let ask = ask
            .arg("--kubeconfig")
            .arg(&place.env.kubeconfig)
            .args(["auth", "can-i", "get", "/metrics", "--as", &reader]);
        Ok(ask.status()?.success())
    };
    eventually("the right to be known", || async { may_read() }).await?;
    let token = |account: &str| place.kubectl(&["create", "token", account]);
    let (reads, strange) = (token("reader")?, token("stranger")?);

    // The certificate of another authority comes first.
    let folder = place.env.run_dir.join(&place.namespace);
    std::fs::create_dir_all(&folder)?;
    let write = |identity: &Identity| {
        std::fs::write(folder.join("tls.crt"), &identity.cert_pem)?;
        std::fs::write(folder.join("tls.key"), &identity.key_pem)
    };
    write(&Ca::generate()?.server()?)?;
    let config = json!({
        "watchNamespaces": [place.namespace], "timing": {"configPoll": "50ms"},
        "metrics": {"certFile": folder.join("tls.crt"), "keyFile": folder.join("tls.key"), "authentication": "TokenReview"},
    });
    let address = format!("127.0.0.1:{}", free_port()?);
    let operator = place.operator_of(&config, &["--metrics-listen", &address])?;
    eventually("readiness, which is open to all", || async { Ok(operator.get("/readyz").await?.0 == 200) }).await?;
    ensure!(scraped(&address, Some(reads.trim())).await.is_err(), "the certificate is not that of the files");
    write(&place.env.ca()?.server()?)?;
    eventually("the new certificate", || async { Ok(scraped(&address, None).await?.0 == 401) }).await?;
    write(&Identity { cert_pem: "garbage".into(), key_pem: "garbage".into() })?;
    eventually("the wrong certificate to be noticed", || async {
        Ok(operator.logged()?.contains("the certificate of the metrics stays as it was"))
    })
    .await?;

    for (token, status) in [(None, 401), (Some("a.b.c"), 401), (Some(strange.trim()), 403), (Some(reads.trim()), 200)] {
        let (found, text) = scraped(&address, token).await?;
        ensure!(found == status, "{found} where {status} was expected");
        ensure!(text.contains("imagemirror_leader") == (status == 200), "{status}: {text}");
    }
    // What the API server said is remembered for a moment: it is not asked with every scrape.
    place.kubectl(&["delete", "clusterrolebinding", &role])?;
    eventually("the right to be gone", || async { Ok(!may_read()?) }).await?;
    ensure!(scraped(&address, Some(reads.trim())).await?.0 == 200);

    ensure!(operator.get("/metrics").await?.0 == 404, "they are served beside the probes too");
    let secure = Operator { listen: address, ..operator };
    ensure!(secure.get("/metrics").await.is_err(), "there is an answer without TLS");
    Ok(())
}
