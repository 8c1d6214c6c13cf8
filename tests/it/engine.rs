//! The copy engine through the command line: the same `sync()` as the operator's, without Kubernetes.

use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testenv::{
    Env, Registry,
    images::Image,
    proxy::{Action, Close, Gate, Matcher, Proxy, Route},
};

/// A repository prefix, and a spec written to a file.
struct Bench {
    env: &'static Env,
    prefix: String,
    /// `spec.referrers.policy`.
    referrers: &'static str,
}

impl Bench {
    fn new(test: &str) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        Self { referrers: "All", env: Env::get(), prefix: format!("{test}-{:06x}", fastrand::u32(..0x100_0000)) }
    }

    fn repository(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    async fn push(&self, registry: &Registry, name: &str, tag: &str, image: &Image) -> Result<()> {
        testenv::Client::new(self.env, registry)?.push(&self.repository(name), tag, image).await
    }

    async fn holds(&self, name: &str, tag: &str, image: &Image) -> Result<bool> {
        testenv::Client::new(self.env, &self.env.target)?.holds(&self.repository(name), tag, image).await
    }

    /// The file with the mirror, its Secrets and the CA.
    fn file(&self, source: &Registry, target: &Registry, images: &[(&str, &[&str])]) -> Result<std::path::PathBuf> {
        let secret = |name: &str, registry: &Registry| {
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "kubernetes.io/dockerconfigjson",
                   "stringData": {".dockerconfigjson": registry.dockerconfigjson()}})
        };
        let images: Vec<Value> = images
            .iter()
            .map(|(name, tags)| json!({"source": format!("{}/{}", source.host, self.repository(name)), "tags": tags}))
            .collect();
        let mut hosts = vec![&source.host, &target.host];
        hosts.dedup();
        let registries: Vec<Value> =
            hosts.iter().map(|host| json!({"host": host, "certSecretRef": {"name": "ca"}})).collect();
        let documents = [
            json!({"apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": "m"}, "spec": {
                "imagePullSecrets": [{"name": "pull"}], "registries": registries, "images": images,
                "referrers": {"policy": self.referrers},
                "target": {"registry": target.host, "secretRef": {"name": "push"}},
            }}),
            secret("pull", source),
            secret("push", target),
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ca"}, "type": "Opaque",
                   "stringData": {"ca.crt": self.env.ca_pem}}),
        ];
        let text: Vec<String> = documents.iter().map(ToString::to_string).collect();
        let path = self.env.run_dir.join(format!("{}-{:06x}.yaml", self.prefix, fastrand::u32(..0x100_0000)));
        std::fs::write(&path, text.join("\n---\n"))?;
        Ok(path)
    }

    async fn sync(&self, source: &Registry, target: &Registry, images: &[(&str, &[&str])]) -> Result<Synced> {
        let file = self.file(source, target, images)?;
        let mut command = tokio::process::Command::from(imagemirror(&["sync", "-o", "json", "-f"]));
        let output = command.arg(file).kill_on_drop(true).output();
        let output = tokio::time::timeout(crate::support::PATIENCE, output).await??;
        let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Ok(Synced { output, report })
    }
}

fn imagemirror(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
    command.args(arguments);
    command
}

struct Synced {
    output: Output,
    report: Value,
}

impl Synced {
    fn code(&self) -> Option<i32> {
        self.output.status.code()
    }

    fn image(&self, index: usize) -> &Value {
        &self.report["mirrors"][0]["images"][index]
    }

    fn reason(&self) -> &str {
        self.image(0)["failure"]["reason"].as_str().unwrap_or_default()
    }
}

#[tokio::test]
async fn a_fresh_copy_an_update_and_a_no_op_take_the_fewest_requests() -> Result<()> {
    let bench = Bench { referrers: "None", ..Bench::new("requests") };
    let source = Proxy::to(bench.env, &bench.env.source).label("source").start().await?;
    let target = Proxy::to(bench.env, &bench.env.target).label("target").start().await?;
    // Two platforms of three layers each, one of them large: 2 manifests, 8 blobs.
    let image = Image::multi_arch(51, &[1_500_000, 40_000, 100], &["linux/amd64", "linux/arm64"]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    let (platforms, blobs) = (image.manifests.len(), image.blobs.len());

    let fresh = bench.sync(source.registry(), target.registry(), &[("agent", &["1"])]).await?;
    ensure!(fresh.code() == Some(0), "{}", String::from_utf8_lossy(&fresh.output.stderr));
    ensure!(bench.holds("agent", "1", &image).await?);
    ensure!(fresh.image(0)["action"] == "Copy");
    let count = |proxy: &Proxy, method: &str, route| proxy.count(&Matcher::new().method(method).route(route));
    // One 401 on each side on top.
    let from_source = source.requests().len();
    ensure!(from_source == 1 + platforms + blobs + 1, "{from_source} requests to the source: {:#?}", source.requests());
    let to_target = target.requests().len();
    ensure!(
        to_target == 1 + 2 * blobs + platforms + 1 + 1,
        "{to_target} requests to the target: {:#?}",
        target.requests()
    );
    ensure!(count(&target, "POST", Route::UploadStart) == blobs && count(&target, "PUT", Route::Upload) == blobs);
    ensure!(target.violations().is_empty(), "{:?}", target.violations());

    source.forget();
    target.forget();
    let unchanged = bench.sync(source.registry(), target.registry(), &[("agent", &["1"])]).await?;
    ensure!(unchanged.code() == Some(0) && unchanged.image(0)["action"] == "Unchanged");
    ensure!(source.requests().len() == 1 + 1 && target.requests().len() == 1 + 1, "a no-op is one HEAD a side");
    Ok(())
}

#[tokio::test]
async fn every_kind_of_image_keeps_its_digest_and_every_byte() -> Result<()> {
    let bench = Bench::new("kinds");
    let images = [
        ("oci", Image::multi_arch(61, &[1_048_576, 1_048_577, 1], &["linux/amd64", "linux/arm64"])),
        ("docker", Image::docker(62, &[70_000], &["linux/amd64", "linux/arm64"])),
        ("single", Image::single(63, &[5])),
        ("empty-layer", Image::single(64, &[0, 10])),
        ("no-layers", Image::single(65, &[])),
        ("many-layers", Image::single(66, &[1000; 40])),
    ];
    for (name, image) in &images {
        bench.push(&bench.env.source, name, "1", image).await?;
    }
    let wanted: Vec<(&str, &[&str])> = images.iter().map(|(name, _)| (*name, &["1"][..])).collect();
    let synced = bench.sync(&bench.env.source, &bench.env.target, &wanted).await?;
    ensure!(synced.code() == Some(0), "{:#}", synced.report);
    for (name, image) in &images {
        ensure!(bench.holds(name, "1", image).await?, "{name} is not the same at the target");
    }
    Ok(())
}

#[tokio::test]
async fn corrupt_bytes_are_never_committed_and_the_tag_stays() -> Result<()> {
    for (size, seed) in [(2_000_000, 71), (5_000, 72)] {
        let bench = Bench::new("corrupt");
        let image = Image::single(seed, &[size]);
        bench.push(&bench.env.source, "agent", "1", &image).await?;
        let source = Proxy::to(bench.env, &bench.env.source).start().await?;
        let layer = image.blobs.iter().find(|blob| blob.bytes.len() == size).map(|blob| blob.digest.clone());
        let layer = layer.unwrap_or_default();
        source.rule(Matcher::new().method("GET").route(Route::Blob).reference(&layer), Action::FlipByte { at: 1234 });
        let synced = bench.sync(source.registry(), &bench.env.target, &[("agent", &["1"])]).await?;
        ensure!(synced.code() == Some(1) && synced.reason() == "IntegrityError", "{:#}", synced.report);
        let target = testenv::Client::new(bench.env, &bench.env.target)?;
        ensure!(target.digest_of(&bench.repository("agent"), "1").await?.is_none(), "the tag was written");
        ensure!(target.blob(&bench.repository("agent"), &layer).await?.is_none(), "corrupt bytes were committed");
        // Once is one broken connection: it is read again.
        source.clear();
        let once = Matcher::new().method("GET").route(Route::Blob).reference(&layer).times(1);
        source.rule(once, Action::FlipByte { at: 1234 });
        let synced = bench.sync(source.registry(), &bench.env.target, &[("agent", &["1"])]).await?;
        ensure!(synced.code() == Some(0) && bench.holds("agent", "1", &image).await?, "{:#}", synced.report);
    }
    Ok(())
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_broke() -> Result<()> {
    let bench = Bench::new("resume");
    let image = Image::single(81, &[3_000_000]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    let source = Proxy::to(bench.env, &bench.env.source).start().await?;
    let target = Proxy::to(bench.env, &bench.env.target).start().await?;
    let layer =
        image.blobs.iter().max_by_key(|blob| blob.bytes.len()).map(|blob| blob.digest.clone()).unwrap_or_default();
    let get = Matcher::new().method("GET").route(Route::Blob).reference(&layer);
    source.rule(get.clone().times(1), Action::CutResponseBody { after: 1_000_000, close: Close::Reset });
    let synced = bench.sync(source.registry(), target.registry(), &[("agent", &["1"])]).await?;
    ensure!(synced.code() == Some(0) && bench.holds("agent", "1", &image).await?, "{:#}", synced.report);
    let uploads =
        target.count(&Matcher::new().method("PUT").route(Route::Upload).path_contains(&layer.replace(':', "%3A")));
    ensure!(uploads == 1, "the blob was sent {uploads} times");
    let reads: Vec<_> =
        source.requests().into_iter().filter(|read| read.key.reference.as_ref() == Some(&layer)).collect();
    let ranges: Vec<_> = reads.iter().map(|read| read.range.clone()).collect();
    // What a reset takes from the buffers of the kernel is lost; what has arrived is not asked for again.
    ensure!(ranges.len() == 2 && ranges[0].is_none(), "{ranges:?}");
    let start = ranges[1].as_deref().and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    ensure!(start.is_some_and(|start: u64| start > 0 && start <= 1_000_000), "{ranges:?}");
    Ok(())
}

#[tokio::test]
async fn a_download_that_stalls_is_continued_while_the_upload_stays_open() -> Result<()> {
    let bench = Bench::new("stall");
    let image = Image::single(151, &[3_000_000]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    let source = Proxy::to(bench.env, &bench.env.source).start().await?;
    let target = Proxy::to(bench.env, &bench.env.target).start().await?;
    let layer = image.blobs.iter().max_by_key(|blob| blob.bytes.len()).map(|blob| blob.digest.clone());
    let get = Matcher::new().method("GET").route(Route::Blob).reference(&layer.unwrap_or_default());
    source.rule(get.clone().times(1), Action::StallResponseBody { after: 1_000_000 });
    let repository = bench.repository("agent");
    let report = crate::cases::copy(bench.env, source.registry(), target.registry(), &repository, &repository).await?;
    ensure!(report.failed().next().is_none() && bench.holds("agent", "1", &image).await?, "{report:?}");
    ensure!(source.count(&get) == 2, "it was read {} times", source.count(&get));
    let uploads = target.count(&Matcher::new().method("PUT").route(Route::Upload));
    ensure!(uploads == image.blobs.len(), "{uploads} uploads of {} blobs", image.blobs.len());
    Ok(())
}

#[tokio::test]
async fn a_registry_that_asks_to_be_left_alone_for_long_is_not_waited_for() -> Result<()> {
    let bench = Bench::new("limited");
    let image = Image::single(161, &[10]);
    for name in ["a", "b"] {
        bench.push(&bench.env.source, name, "1", &image).await?;
    }
    let source = Proxy::to(bench.env, &bench.env.source).start().await?;
    let busy = Action::respond(429).header("Retry-After", "3000");
    source.rule(Matcher::new().route(Route::Manifest).skip(1), busy);
    let synced = bench.sync(source.registry(), &bench.env.target, &[("a", &["1"]), ("b", &["1"])]).await?;
    ensure!(synced.code() == Some(1) && synced.reason() == "RateLimited", "{:#}", synced.report);
    let messages: Vec<_> = (0..2).filter_map(|at| synced.image(at)["failure"]["message"].as_str()).collect();
    ensure!(synced.image(1)["failure"]["reason"] == "RateLimited", "{:#}", synced.report);
    for message in &messages {
        // The last word of each is when.
        let until: jiff::Timestamp = message.rsplit(' ').next().unwrap_or_default().parse()?;
        let wait = until.duration_since(jiff::Timestamp::now()).as_secs();
        ensure!((2900..=3010).contains(&wait), "{wait} s: {message}");
    }
    let message = messages.join("; ");
    ensure!(source.requests().len() <= 4, "it was not left alone: {} requests, {message}", source.requests().len());
    Ok(())
}

#[tokio::test]
async fn of_a_quota_that_is_nearly_used_up_the_rest_is_taken_slowly() -> Result<()> {
    let bench = Bench::new("quota");
    let tags: Vec<String> = (0..40).map(|tag| tag.to_string()).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    for (seed, tag) in (0..).zip(&tags) {
        bench.push(&bench.env.source, "agent", tag, &Image::single(170 + seed, &[10])).await?;
    }
    let source = Proxy::to(bench.env, &bench.env.source).start().await?;
    let quota = |left: &str| {
        [Action::set_header("RateLimit-Limit", "100;w=21600"), Action::set_header("RateLimit-Remaining", left)]
    };
    source.rule(Matcher::new().route(Route::Manifest), quota("9;w=21600").to_vec());
    let synced = bench.sync(source.registry(), &bench.env.target, &[("agent", &tags)]).await?;
    let pulls = Matcher::new().method("GET").route(Route::Manifest);
    let pulled = source.requests().iter().filter(|one| pulls.matches(&one.key, "") && one.status == Some(200)).count();
    // Half of those that may be in flight began before the first answer, and some may always begin.
    ensure!((5..=24).contains(&pulled), "{pulled} manifests were read");
    ensure!(synced.code() == Some(1), "{:#}", synced.report);
    let failures: Vec<_> =
        (0..tags.len()).map(|at| synced.image(at)["failure"].clone()).filter(Value::is_object).collect();
    ensure!(failures.len() == tags.len() - pulled, "{failures:?}");
    ensure!(failures.iter().all(|failure| failure["reason"] == "RateLimited"), "{failures:?}");

    source.clear();
    source.rule(Matcher::new().route(Route::Manifest), quota("99;w=21600").to_vec());
    let synced = bench.sync(source.registry(), &bench.env.target, &[("agent", &tags)]).await?;
    ensure!(synced.code() == Some(0), "with enough left all are read: {:#}", synced.report);
    Ok(())
}

#[tokio::test]
async fn an_upload_that_breaks_is_looked_at_and_sent_again() -> Result<()> {
    let bench = Bench::new("reupload");
    let image = Image::single(91, &[3_000_000, 4_000]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    for fault in [
        Action::CutRequestBody { after: 1_000, close: Close::Reset },
        Action::CloseAfterAnswer(Close::Reset),
        Action::CloseBefore(Close::Fin),
        Action::respond(503),
    ] {
        let target = Proxy::to(bench.env, &bench.env.target).start().await?;
        target.rule(Matcher::new().method("PUT").route(Route::Upload).times(2), fault.clone());
        let synced = bench.sync(&bench.env.source, target.registry(), &[("agent", &["1"])]).await?;
        ensure!(synced.code() == Some(0), "{fault:?}: {:#}", synced.report);
        ensure!(bench.holds("agent", "1", &image).await?, "{fault:?}");
        ensure!(target.violations().is_empty(), "{fault:?}: {:?}", target.violations());
        testenv::Client::new(bench.env, &bench.env.target)?.delete(&bench.repository("agent"), "1").await?;
    }
    Ok(())
}

#[tokio::test]
async fn credentials_go_to_no_token_server_of_another_domain() -> Result<()> {
    let bench = Bench::new("realm");
    let image = Image::single(101, &[10]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    let source = Proxy::to(bench.env, &bench.env.source).start().await?;
    let listener = Proxy::to(bench.env, &bench.env.source).start().await?;
    let realm = format!(
        r#"Bearer realm="https://localhost:{}/token",service="x""#,
        listener.host().rsplit(':').next().unwrap_or_default()
    );
    source.rule(Matcher::new(), Action::respond(401).header("WWW-Authenticate", &realm));
    let synced = bench.sync(source.registry(), &bench.env.target, &[("agent", &["1"])]).await?;
    ensure!(synced.code() == Some(1) && synced.reason() == "Blocked", "{:#}", synced.report);
    ensure!(listener.requests().is_empty(), "the other server heard of us: {:?}", listener.requests());
    Ok(())
}

#[tokio::test]
async fn uploads_and_redirects_do_not_leave_the_registry_with_credentials() -> Result<()> {
    let bench = Bench::new("leaks");
    let image = Image::single(111, &[10]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    let listener = Proxy::to(bench.env, &bench.env.source).start().await?;
    let elsewhere = format!("https://{}/v2/x/blobs/uploads/1", listener.host());
    let target = Proxy::to(bench.env, &bench.env.target).start().await?;
    let start = Matcher::new().method("POST").route(Route::UploadStart);
    target.rule(start, Action::set_header("Location", &elsewhere));
    let synced = bench.sync(&bench.env.source, target.registry(), &[("agent", &["1"])]).await?;
    ensure!(synced.code() == Some(1) && synced.reason() == "Blocked", "{:#}", synced.report);
    ensure!(listener.requests().is_empty(), "bytes were sent elsewhere");
    // A redirect of a download is followed, without the credential.
    let source = Proxy::to(bench.env, &bench.env.source).start().await?;
    let away = format!("https://{}/v2/{}/blobs/{}", listener.host(), bench.repository("agent"), image.blobs[0].digest);
    let blob = Matcher::new().method("GET").route(Route::Blob);
    source.rule(blob, Action::respond(307).header("Location", &away));
    let synced = bench.sync(source.registry(), &bench.env.target, &[("agent", &["1"])]).await?;
    ensure!(synced.code() == Some(1), "the other host asks for a login that it must not get");
    let asked = listener.requests();
    ensure!(!asked.is_empty() && asked.iter().all(|exchange| !exchange.authorized), "{asked:?}");
    Ok(())
}

#[tokio::test]
async fn exit_codes_and_words_say_what_happened() -> Result<()> {
    let bench = Bench::new("cli");
    let image = Image::single(121, &[10]);
    bench.push(&bench.env.source, "agent", "1", &image).await?;
    let file = bench.file(&bench.env.source, &bench.env.target, &[("agent", &["1", "2"])])?;
    let run = |arguments: &[&str]| {
        let output = imagemirror(arguments).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok::<_, anyhow::Error>((output.status.code(), text(&output.stdout), text(&output.stderr)))
    };
    let path = file.display().to_string();
    let (code, out, err) = run(&["sync", "-f", &path])?;
    ensure!(code == Some(1), "{err}");
    ensure!(err.contains("credentials: the Secrets in the files"), "{err}");
    ensure!(out.contains("copied     ") && out.contains("failed     ") && out.contains("SourceNotFound"), "{out}");
    ensure!(out.contains("m: 1/2 in step"), "{out}");
    for (arguments, expected) in [
        (&["sync"][..], "--filename"),
        (&["sync", "-f", "/does/not/exist"], "cannot be read"),
        (&["sync", "-f", concat!(env!("CARGO_MANIFEST_DIR"), "/config/operator.yaml")], "document 1"),
        (&["operator", "--config", "/does/not/exist"], "/does/not/exist"),
        (&["nonsense"], "unrecognized subcommand"),
    ] {
        let (code, _, err) = run(arguments)?;
        ensure!(code == Some(2) && err.contains(expected), "{arguments:?}: {code:?} {err}");
    }
    let (code, out, _) = run(&["crd"])?;
    let committed =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/crds/imagemirrors.imagemirror.dev.yaml"))?;
    ensure!(code == Some(0) && out == committed, "crds/ is not current: run `make generate`");
    Ok(())
}

#[tokio::test]
async fn without_secrets_in_the_files_the_docker_configuration_is_used() -> Result<()> {
    let bench = Bench::new("docker-config");
    let image = Image::single(131, &[10]);
    let open = &bench.env.open;
    testenv::Client::new(bench.env, open)?.push(&bench.repository("agent"), "1", &image).await?;
    let mirror = json!({"apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": "m"}, "spec": {
        "imagePullSecrets": [{"name": "not-in-the-files"}],
        "registries": [{"host": open.host, "plainHTTP": true}],
        "images": [{"source": format!("{}/{}:1", open.host, bench.repository("agent")), "targetRepository": bench.repository("copy")}],
        "target": {"registry": open.host},
    }});
    let directory = bench.env.run_dir.join(&bench.prefix);
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("config.json"), json!({"auths": {}}).to_string())?;
    let file = directory.join("mirror.yaml");
    std::fs::write(&file, mirror.to_string())?;
    let output = imagemirror(&["sync", "-f"]).arg(file).env("DOCKER_CONFIG", &directory).output()?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && err.contains("credentials: the Docker configuration"), "{err}");
    ensure!(testenv::Client::new(bench.env, open)?.holds(&bench.repository("copy"), "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn the_docker_configuration_has_its_helpers_asked_and_is_not_overlooked_where_it_is_broken() -> Result<()> {
    let bench = Bench::new("docker-helper");
    let image = Image::single(132, &[10]);
    let (source, target) = (&bench.env.source, &bench.env.target);
    bench.push(source, "agent", "1", &image).await?;
    let directory = bench.env.run_dir.join(&bench.prefix);
    std::fs::create_dir_all(&directory)?;
    let helper = directory.join("docker-credential-testenv");
    let answer = |registry: &testenv::Registry| json!({"ServerURL": registry.host, "Username": registry.username, "Secret": registry.password});
    std::fs::write(
        &helper,
        format!(
            "#!/bin/sh\nread -r server\necho \"$1 $server\" >> '{0}'\ncase $server in {1}) echo '{2}';; {3}) echo '{4}';; \
             *) echo 'credentials not found in native keychain'; exit 1;; esac\n",
            directory.join("asked").display(),
            source.host,
            answer(source),
            target.host,
            answer(target)
        ),
    )?;
    std::fs::set_permissions(&helper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mirror = json!({"apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": {"name": "m"}, "spec": {
        "images": [{"source": format!("{}/{}:1", source.host, bench.repository("agent")), "targetRepository": bench.repository("copy")}],
        "target": {"registry": target.host},
    }});
    let file = directory.join("mirror.yaml");
    std::fs::write(&file, mirror.to_string())?;
    let path = format!("{}:{}", directory.display(), std::env::var("PATH")?);
    let sync = |configuration: &str| -> Result<(Option<i32>, String)> {
        std::fs::write(directory.join("config.json"), configuration)?;
        let mut sync = imagemirror(&["sync", "-f"]);
        sync.arg(&file).env("DOCKER_CONFIG", &directory).env("PATH", &path).env("SSL_CERT_FILE", &bench.env.ca_path);
        let output = sync.output()?;
        Ok((output.status.code(), String::from_utf8(output.stderr)?))
    };
    let (code, err) = sync("{\"auths\": {},}")?;
    ensure!(code == Some(2) && err.contains("config.json is not valid JSON"), "{code:?} {err}");
    let helpers = json!({"credHelpers": {&source.host: "testenv"}, "credsStore": "testenv"});
    let (code, err) = sync(&helpers.to_string())?;
    ensure!(code == Some(0), "{code:?} {err}");
    let asked = std::fs::read_to_string(directory.join("asked"))?;
    ensure!(
        asked == format!("get {}\nget {}\n", source.host, target.host)
            || asked == format!("get {}\nget {}\n", target.host, source.host),
        "{asked}"
    );
    ensure!(testenv::Client::new(bench.env, target)?.holds(&bench.repository("copy"), "1", &image).await?);
    Ok(())
}

#[tokio::test]
async fn a_layer_that_two_images_share_is_sent_once_and_mounted() -> Result<()> {
    let bench = Bench::new("mount");
    let image = Image::single(141, &[2_000_000]);
    for name in ["agent", "cluster-agent"] {
        bench.push(&bench.env.source, name, "1", &image).await?;
    }
    let target = Proxy::to(bench.env, &bench.env.target).start().await?;
    // One after the other: the second finds what the first has brought.
    let file = bench.file(&bench.env.source, target.registry(), &[("agent", &["1"]), ("cluster-agent", &["1"])])?;
    let gate = Gate::new();
    target.rule(Matcher::new().repository(&bench.repository("cluster-agent")), Action::Gate(gate.clone()));
    let sync = tokio::process::Command::from(imagemirror(&["sync", "-o", "json", "-f"])).arg(file).output();
    let first = Matcher::new().method("PUT").route(Route::Manifest).repository(&bench.repository("agent"));
    let in_order = async {
        target.wait_for_request(&first).await?;
        gate.open();
        target.clear();
        Ok::<_, anyhow::Error>(())
    };
    let (output, in_order) = tokio::join!(sync, in_order);
    in_order?;
    let report: Value = serde_json::from_slice(&output?.stdout)?;
    let totals = &report["mirrors"][0]["totals"];
    ensure!(totals["blobsMounted"] == 1 && totals["blobsCopied"] == 3, "{totals}");
    ensure!(bench.holds("agent", "1", &image).await? && bench.holds("cluster-agent", "1", &image).await?);
    Ok(())
}

/// Killed where it hurts: before and after the registry has done its part of a step. What is at the target then is
/// completed by the next run, and no manifest ever stands before its children.
#[tokio::test]
async fn a_sync_that_is_killed_anywhere_is_completed_by_the_next_one() -> Result<()> {
    let image = Image::multi_arch(71, &[1_200_000, 3_000], &["linux/amd64", "linux/arm64"]);
    let put = || Matcher::new().method("PUT");
    let child = &image.manifests[0].digest;
    let places = [
        ("an upload is opened", Matcher::new().method("POST").route(Route::UploadStart).skip(2)),
        ("a blob is sent", put().route(Route::Upload)),
        ("a manifest is put", put().route(Route::Manifest).reference(child)),
        ("the tag is put", put().route(Route::Manifest).reference("1")),
    ];
    for (what, matcher) in places {
        for is_after in [false, true] {
            let bench = Bench::new("killed");
            bench.push(&bench.env.source, "agent", "1", &image).await?;
            let target = Proxy::to(bench.env, &bench.env.target).label("target").start().await?;
            let gate = Gate::new();
            let action = if is_after { Action::GateAnswer(gate.clone()) } else { Action::Gate(gate.clone()) };
            target.rule(matcher.clone(), action);
            let file = bench.file(&bench.env.source, target.registry(), &[("agent", &["1"])])?;
            let mut command = tokio::process::Command::from(imagemirror(&["sync", "-f"]));
            let mut running =
                command.arg(file).kill_on_drop(true).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            gate.arrived(1).await.context(what)?;
            running.kill().await?;

            target.clear();
            gate.open();
            let next = bench.sync(&bench.env.source, target.registry(), &[("agent", &["1"])]).await?;
            ensure!(next.code() == Some(0), "{what}: {}", String::from_utf8_lossy(&next.output.stderr));
            ensure!(bench.holds("agent", "1", &image).await?, "{what}: the target does not hold the image");
            ensure!(target.violations().is_empty(), "{what}: {:?}", target.violations());
        }
    }
    Ok(())
}
