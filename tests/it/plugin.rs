//! `kubectl imagemirror`, run by kubectl itself, against the real API server and an operator.

use std::{path::PathBuf, process::Command};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testenv::{
    Proxy,
    images::Image,
    proxy::{Action, Matcher},
};

use crate::{
    golden::Session,
    support::{Place, eventually, kubectl, run},
};

/// kubectl with the plugin, for the user of a kubeconfig.
pub(crate) struct Plugin<'a> {
    place: &'a Place,
    programs: PathBuf,
    kubeconfig: PathBuf,
}

impl<'a> Plugin<'a> {
    pub(crate) fn new(place: &'a Place) -> Result<Self> {
        let programs = place.env.run_dir.join(format!("{}-programs", place.namespace));
        std::fs::create_dir(&programs)?;
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_imagemirror"), programs.join("kubectl-imagemirror"))?;
        Ok(Self { place, programs, kubeconfig: place.env.kubeconfig.clone() })
    }

    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(self.place.env.tools.join("kubectl"));
        command.arg("imagemirror").args(arguments.split(' '));
        command.env("PATH", &self.programs).env("KUBECONFIG", &self.kubeconfig);
        command
    }

    pub(crate) fn show(&self, session: &mut Session<'_>, arguments: &str) -> Result<String> {
        session.run(&format!("kubectl imagemirror {arguments}"), &mut self.command(arguments))
    }
}

#[tokio::test]
async fn every_command_is_as_in_the_golden_file() -> Result<()> {
    let place = Place::new("plugin").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let plugin = Plugin::new(&place)?;
    let mut session = Session::new(&place)?.with_ages()?;
    let here = format!("-n {}", place.namespace);
    plugin.show(&mut session, &format!("list {here}"))?;
    place.push(source, "agent", "1", &Image::single(501, &[2_000_000])).await?;
    place.apply("datadog", &place.spec(source, target, &[("agent", &["1"])])).await?;
    plugin.show(&mut session, &format!("list {here}"))?;
    plugin.show(&mut session, &format!("status datadog {here}"))?;
    plugin.show(&mut session, &format!("diff datadog {here}"))?;
    let _operator = place.operator()?;
    place.until_ready("datadog").await?;
    plugin.show(&mut session, &format!("diff datadog {here}"))?;
    plugin.show(&mut session, &format!("sync datadog --wait {here}"))?;
    plugin.show(&mut session, &format!("list {here}"))?;
    plugin.show(&mut session, &format!("status datadog {here}"))?;
    plugin.show(&mut session, &format!("suspend datadog {here}"))?;
    plugin.show(&mut session, &format!("suspend datadog {here}"))?;
    plugin.show(&mut session, &format!("sync datadog --wait {here}"))?;
    plugin.show(&mut session, &format!("sync datadog {here}"))?;
    plugin.show(&mut session, &format!("list {here}"))?;
    plugin.show(&mut session, &format!("resume datadog {here}"))?;
    plugin.show(&mut session, &format!("resume datadog {here}"))?;
    let spec = place.mirrors().get("datadog").await?.spec;
    ensure!(spec.suspend.is_none(), "resume leaves {:?}", spec.suspend);

    place.apply("broken", &place.spec(source, target, &[("agent", &["1", "2"])])).await?;
    place.until_reason("broken", "PartialFailure").await?;
    let out = plugin.show(&mut session, &format!("sync broken --wait {here}"))?;
    ensure!(out.contains("SourceNotFound"), "{out}");
    let mut never = place.spec(source, target, &[("agent", &["1"])]);
    never["policy"] = json!({"overwrite": "Never"});
    never["target"]["repository"] = format!("{}/left", place.prefix).into();
    place.push(target, "left", "1", &Image::single(502, &[10])).await?;
    place.apply("left", &never).await?;
    place.until_ready("left").await?;
    plugin.show(&mut session, &format!("sync left --wait {here}"))?;
    session.check("plugin")?;

    let list: Value = serde_json::from_slice(&plugin.command(&format!("list {here} -o json")).output()?.stdout)?;
    ensure!(list["items"].as_array().is_some_and(|items| items.len() == 3), "{list:#}");
    let one: Value = serde_json::from_slice(&plugin.command(&format!("status left {here} -o json")).output()?.stdout)?;
    ensure!(one["metadata"]["name"] == "left", "{one:#}");
    let all = run(&mut plugin.command("list -A"), None)?;
    ensure!(all.contains(&format!("{}/left", place.namespace)), "{all}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_is_waited_for_shows_how_far_it_is_and_ends_with_the_object() -> Result<()> {
    let place = Place::new("plugin-wait").await?;
    let slow = Proxy::to(place.env, &place.env.source).bytes_per_second_down(1_000_000).start().await?;
    place.pull_secret("pull", &[slow.registry()]).await?;
    let _operator = place.operator()?;
    place.push(&place.env.source, "agent", "1", &Image::single(511, &[10])).await?;
    place.apply("m", &place.spec(slow.registry(), &place.env.target, &[("agent", &["1"])])).await?;
    place.until_ready("m").await?;
    // The tag has moved, which nobody would see for an hour.
    let image = Image::single(512, &[3_000_000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let plugin = Plugin::new(&place)?;
    let output = plugin.command(&format!("sync m --wait -n {}", place.namespace)).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(0) && out.contains("m: 1/1 in step, 3.0 MB in "), "{out}{err}");
    ensure!(err.contains("0 of 1 images, ") && err.contains(" of 3.0 MB"), "no progress: {err}");
    ensure!(place.holds(&place.env.target, "agent", "1", &image).await?);

    // Deleted while it is waited for, and a wait that is too short.
    place.push(&place.env.source, "agent", "1", &Image::single(513, &[20_000_000])).await?;
    let short = plugin.command(&format!("sync m --wait --timeout 1s -n {}", place.namespace)).output()?;
    let said = String::from_utf8_lossy(&short.stderr);
    ensure!(short.status.code() == Some(1) && said.contains("has not ended in time; it goes on"), "{said}");
    let before = requested(&place).await?;
    let waiting = plugin.command(&format!("sync m --wait -n {}", place.namespace));
    let waiting = tokio::process::Command::from(waiting).stderr(std::process::Stdio::piped()).spawn()?;
    let asked = || async { Ok(requested(&place).await? != before) };
    eventually("the request", asked).await?;
    place.kubectl(&["delete", "imagemirror", "m"])?;
    let output = tokio::time::timeout(crate::support::PATIENCE, waiting.wait_with_output()).await??;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("m has been deleted"), "{said}");
    Ok(())
}

/// What the annotation that asks for a sync says.
async fn requested(place: &Place) -> Result<Option<String>> {
    Ok(place.mirrors().get("m").await?.requested_at().map(ToOwned::to_owned))
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_cluster_are_as_in_the_golden_file() -> Result<()> {
    let place = Place::new("plugin-errors").await?;
    let env = place.env;
    let mut plugin = Plugin::new(&place)?;
    let mut session = Session::new(&place)?.with_ages()?;
    let here = format!("-n {}", place.namespace);
    plugin.show(&mut session, &format!("status none {here}"))?;
    plugin.show(&mut session, &format!("suspend none {here}"))?;
    plugin.show(&mut session, &format!("status ../x {here}"))?;
    plugin.show(&mut session, &format!("list {here} --context none"))?;
    plugin.show(&mut session, "list --kubeconfig no-such-file")?;
    plugin.show(&mut session, &format!("list {here} --as nobody"))?;
    place.apply("m", &place.spec(&env.source, &env.target, &[("agent", &["1"])])).await?;
    // May read and patch the object, but not its Secrets.
    let reader = "imagemirrors.imagemirror.dev";
    place.kubectl(&["create", "role", "reader", "--verb=get,list,watch,patch", &format!("--resource={reader}")])?;
    place.kubectl(&[
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        &format!("--serviceaccount={}:default", place.namespace),
    ])?;
    let user = format!("system:serviceaccount:{}:default", place.namespace);
    plugin.show(&mut session, &format!("diff m {here} --as {user}"))?;
    plugin.show(&mut session, &format!("list {here} --as {user}"))?;

    // As a user with a token, behind a proxy that does what API servers can do.
    let token = kubectl(env, &["create", "token", "default", "-n", &place.namespace])?;
    let proxy = Proxy::to_apiserver(env).start().await?;
    plugin.kubeconfig = env.run_dir.join(format!("{}-user.kubeconfig", place.namespace));
    std::fs::write(&plugin.kubeconfig, env.kubeconfig_for(token.trim()).replace(&env.apiserver, &proxy.url()))?;
    let unknown = || Action::respond(404).header("Content-Type", "text/plain").body("404 page not found\n");
    let unauthorized = json!({"kind": "Status", "status": "Failure", "code": 401, "reason": "Unauthorized", "message": "Unauthorized"});
    let unauthorized =
        || Action::respond(401).header("Content-Type", "application/json").body(unauthorized.to_string());
    let all = || Matcher::new().path_contains("/apis/imagemirror.dev/");
    proxy.rule(all().times(2), unknown());
    plugin.show(&mut session, &format!("list {here}"))?;
    plugin.show(&mut session, &format!("status m {here}"))?;
    proxy.rule(all().times(1), unauthorized());
    plugin.show(&mut session, &format!("list {here}"))?;
    let url = proxy.url();
    proxy.stop().await;
    plugin.show(&mut session, &format!("list {here}"))?;
    session.text = session.text.replace(&url, "https://kubernetes.example");
    for line in session.text.lines().filter(|line| line.starts_with("kubectl imagemirror: ")) {
        ensure!(line.contains("; "), "nothing says what to do: {line}");
    }
    session.check("plugin-errors")
}
