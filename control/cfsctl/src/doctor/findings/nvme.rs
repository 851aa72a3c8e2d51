//! Each NVMe controller: what a server could make of it.

use super::finding;
use crate::doctor::machine::Machine;
use crate::doctor::nvme::{Controller, Controllers};
use crate::doctor::{Finding, State};
use crate::show::bytes;

/// Users of a controller that are listed; the root of a machine with containers has hundreds of mounts.
const USERS_SHOWN: usize = 4;

pub fn of(machine: &Machine) -> Vec<Finding> {
    let through_kernel = "targets are files and block devices";
    let Some(nvme) = &machine.nvme else { return vec![finding("NVMe", State::Unknown, "unknown", through_kernel)] };
    if nvme.list.is_empty() {
        return vec![finding("NVMe", State::Unused, "none", through_kernel)];
    }
    let mut findings: Vec<Finding> =
        nvme.list.iter().map(|controller| nvme_controller(machine, nvme, controller)).collect();
    findings.extend(poll_queues(nvme));
    findings
}

/// Whether a server may drive it itself.
pub fn is_ours(controller: &Controller) -> bool {
    controller.driver.as_deref() == Some("vfio-pci")
}

/// Whether somebody uses it who is no server.
fn is_taken(controller: &Controller) -> bool {
    // Servers are known by their name, as the tables of open files have it.
    controller.users().iter().any(|user| !user.contains("open in cfs ("))
}

fn nvme_controller(machine: &Machine, nvme: &Controllers, controller: &Controller) -> Finding {
    let address = &controller.address;
    let users = users(nvme, controller);
    let driver = controller.driver.as_deref();
    let mut found = controller.model.clone().unwrap_or_else(|| "model unknown".to_owned());
    found += &format!(", {}", driver.map_or("no driver".to_owned(), |driver| format!("driver {driver}")));
    match &controller.namespaces {
        None => found += ", namespaces unknown",
        Some(list) => {
            for namespace in list {
                let size = namespace.bytes.map_or("size unknown".to_owned(), bytes);
                found += &format!(", {} ({size})", namespace.name);
            }
        }
    }
    found += &format!("; {users}");
    let described = |state, used: &str| finding(&format!("NVMe {address}"), state, &*found, used);
    let alone = "must be alone in its IOMMU group for that, and shares it with";
    let companions = controller.companions.join(", ");
    match driver {
        Some("vfio-pci") if is_taken(controller) => described(State::Unused, "not used: left to what uses it"),
        Some("vfio-pci") if companions.is_empty() => {
            described(State::Good, &format!("the target nvme:{address}, without the kernel"))
        }
        Some("vfio-pci") => {
            described(State::Improvable, &format!("the target nvme:{address}: it {alone} {companions}"))
        }
        Some("nvme") if is_taken(controller) => {
            described(State::Unused, "left to what uses it; files on it can be targets")
        }
        Some("nvme") if !controller.users().is_empty() => {
            described(State::Good, "a target of a server, through the kernel")
        }
        Some("nvme") if !nvme.mounts_known || controller.namespaces.is_none() => {
            described(State::Unknown, "not before it is known what uses it")
        }
        Some("nvme") | None => {
            let names = controller.namespaces.iter().flatten().map(|namespace| {
                let generic = namespace.name.replacen("nvme", "ng", 1);
                format!("/dev/{} (or its commands, /dev/{generic})", namespace.name)
            });
            let targets = names.collect::<Vec<_>>().join(", ");
            let kernel = match targets.as_str() {
                "" => String::new(),
                targets => format!("targets {targets}, through the kernel; "),
            };
            if controller.iommu_group.is_none() {
                return described(State::Good, &format!("{kernel}without it (nvme:{address}) takes an IOMMU"));
            }
            if !companions.is_empty() {
                let used = format!("{kernel}it {alone} {companions} (nvme:{address})");
                return described(State::Good, &used);
            }
            let load = if machine.vfio_loaded { "" } else { "modprobe vfio-pci && " };
            let used =
                format!("{kernel}nvme:{address}, without the kernel (seen at work on emulated controllers only)");
            described(State::Improvable, &used).improved_by(format!("{load}cfsctl device bind {address}"))
        }
        Some(_) => described(State::Unused, "not used: a driver that we do not know has it"),
    }
}

fn users(nvme: &Controllers, controller: &Controller) -> String {
    let users = controller.users();
    let hidden = if nvme.hidden_processes { " (only root sees what all programs have open)" } else { "" };
    match users.len() {
        0 if !nvme.mounts_known => "users unknown".to_owned(),
        0 => format!("no user seen{hidden}"),
        count if count > USERS_SHOWN => format!("{} and {} more", users[..USERS_SHOWN].join(", "), count - USERS_SHOWN),
        _ => users.join(", "),
    }
}

/// Whether block devices that are targets, or could be, are polled.
fn poll_queues(nvme: &Controllers) -> Option<Finding> {
    let free = nvme.list.iter().filter(|controller| !is_taken(controller));
    let namespaces: Vec<_> = free.flat_map(|controller| controller.namespaces.iter().flatten()).collect();
    if namespaces.is_empty() || !nvme.mounts_known {
        return None;
    }
    let subject = "NVMe poll queues";
    let used = "reads and writes of targets through the kernel; a core is busy while an operation is under way";
    let without = namespaces.iter().find(|namespace| namespace.polled == Some(false));
    Some(match without {
        Some(namespace) => {
            let found = format!("{} has none", namespace.name);
            finding(subject, State::Improvable, found, used).improved_by("kernel parameter nvme.poll_queues=2")
        }
        None if namespaces.iter().all(|namespace| namespace.polled == Some(true)) => {
            finding(subject, State::Good, "there are", used)
        }
        None => finding(subject, State::Unknown, "unknown", used),
    })
}
