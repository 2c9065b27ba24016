//! Time zone, time servers, language, keyboard.

use super::{RenderError, RenderedFile, word};
use moor_api::deploy::DeployDocument;

pub(super) fn files(document: &DeployDocument) -> Result<Vec<RenderedFile>, RenderError> {
    let zone = document.time_zone.as_deref().unwrap_or("Etc/UTC");
    word("time.zone", zone, "/_+-")?;
    if zone.split('/').any(str::is_empty) {
        let reason = "it is not a name such as Europe/Berlin";
        return Err(RenderError { field: "time.zone", value: zone.chars().take(80).collect(), reason });
    }
    let mut files = vec![
        RenderedFile::link("/etc/localtime", format!("/usr/share/zoneinfo/{zone}")),
        RenderedFile::new("/etc/timezone", 0o644, format!("{zone}\n")),
    ];
    if !document.ntp.is_empty() {
        let servers = document.ntp.iter().map(|server| word("ntp.servers", server, ".-_:"));
        let servers = servers.collect::<Result<Vec<_>, _>>()?.join(" ");
        let text = format!("# Written by moor-agent at boot.\n[Time]\nNTP={servers}\nFallbackNTP=\n");
        files.push(RenderedFile::new("/etc/systemd/timesyncd.conf.d/10-moor.conf", 0o644, text));
    }
    if let Some(lang) = &document.locale.lang {
        let text = format!("LANG={}\n", word("locale.lang", lang, "._-@")?);
        files.push(RenderedFile::new("/etc/locale.conf", 0o644, text.clone()));
        files.push(RenderedFile::new("/etc/default/locale", 0o644, text));
    }
    if let Some(keymap) = &document.locale.keymap {
        let keymap = word("locale.keymap", keymap, "._-")?;
        files.push(RenderedFile::new("/etc/vconsole.conf", 0o644, format!("KEYMAP={keymap}\n")));
        // console-setup reads an XKB layout: the part before a variant ("de-latin1" is layout "de").
        let layout = keymap.split(['-', '_']).next().unwrap_or(keymap);
        let text = format!(
            "XKBMODEL=\"pc105\"\nXKBLAYOUT=\"{layout}\"\nXKBVARIANT=\"\"\nXKBOPTIONS=\"\"\nBACKSPACE=\"guess\"\n"
        );
        files.push(RenderedFile::new("/etc/default/keyboard", 0o644, text));
    }
    Ok(files)
}
