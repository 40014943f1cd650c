//! Machines for tests: network namespaces, joined by a veth pair or by a bridge.
//!
//! Does not know what runs in them. Names carry the process id and a number, so that runs do not meet; what a run leaves behind that was killed,
//! the next run removes. Used by every end-to-end test and by the benchmark.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once};

use cirro_link::any::Mode;

use crate::daemons::link_mode;
use crate::sys;

/// With the process id after it, what every name of ours on this machine begins with.
pub(crate) const PREFIX: &str = "cirrotest-";
/// The name of the one interface that each machine has.
pub const INTERFACE: &str = "wire0";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace that ends with this value.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    fn new(label: &str) -> Namespace {
        static LEFT_OVER: Once = Once::new();
        LEFT_OVER.call_once(remove_left_over);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{label}", std::process::id());
        run(&format!("ip netns add {name}"));
        let namespace = Namespace { name };
        run(&format!("ip -n {} link set lo up", namespace.name));
        namespace.shell("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        namespace
    }

    /// A command that runs in here, and that dies with the thread that starts it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display()));
        command.args(["--", "setpriv", "--pdeathsig", "KILL", "--"]).arg(program);
        command
    }

    /// Runs a shell command in here and gives what it printed.
    ///
    /// # Panics
    /// It failed.
    pub fn shell(&self, line: &str) -> String {
        output(self.command("sh").args(["-c", line]), line)
    }

    /// Runs `work` on a thread that is in here.
    ///
    /// # Panics
    /// `work` panicked, or the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).expect("the namespace is there");
        let inside = move || {
            sys::enter(file.as_fd()).expect("root may enter a namespace");
            work()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// One machine: a namespace and its interface [`INTERFACE`].
#[derive(Debug)]
pub struct Machine {
    namespace: Namespace,
    address: &'static str,
    /// Where the other end of its wire is, and what it is called there, if that is a bridge.
    port: Option<(Arc<Namespace>, String)>,
}

impl Machine {
    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The IPv4 address of its interface.
    pub fn address(&self) -> &str {
        self.address
    }

    /// The MAC address of its interface.
    pub fn mac(&self) -> String {
        let shown = run(&format!("ip -n {} -o link show dev {INTERFACE}", self.namespace.name));
        let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
        words.nth(1).expect("an Ethernet interface has an address").to_owned()
    }

    /// Where frames for this machine can be seen and dropped: a namespace, a device in it, and the hook at which they come by. That is where they
    /// arrive, unless an XDP program takes them before anybody else sees them: then it is the bridge's port.
    pub(crate) fn last_sight(&self) -> (&Namespace, &str, &'static str) {
        match &self.port {
            Some((bridge, port)) if is_xdp() => (bridge, port, "egress"),
            Some(_) | None => (&self.namespace, INTERFACE, "ingress"),
        }
    }

    /// Switches what the kernel does to save TCP and UDP from cutting their own segments.
    pub fn set_segmentation_offload(&self, on: bool) {
        let state = if on { "on" } else { "off" };
        self.namespace.shell(&format!(
            "ethtool -K {INTERFACE} tso {state} gso {state} gro {state} tx-udp-segmentation {state}"
        ));
    }

    /// Puts a wire from the machine to its port of a bridge.
    fn plug(&self, mtu: u32) {
        let (there, (bridge, port)) = (&self.namespace.name, self.port.as_ref().expect("it has one"));
        let here = &bridge.name;
        run(&format!(
            "ip -n {there} link add {INTERFACE} mtu {mtu} type veth peer name {port} mtu {mtu} netns {here}"
        ));
        run(&format!("ip -n {here} link set {port} master bridge0 up"));
    }

    fn finish(&self) {
        let name = &self.namespace.name;
        run(&format!("ip -n {name} addr add {}/24 dev {INTERFACE}", self.address));
        run(&format!("ip -n {name} link set {INTERFACE} up"));
        // Each datagram is a frame of its own, as on a wire: what filters drop is frames.
        self.namespace.shell(&format!("ethtool -K {INTERFACE} tx-udp-segmentation off"));
    }
}

/// Machines on one segment.
#[derive(Debug)]
pub struct Lab {
    /// In the order of [`ADDRESSES`].
    machines: Vec<Machine>,
    bridge: Option<Arc<Namespace>>,
}

impl Lab {
    /// Two machines joined by a veth pair: the VM host and the storage machine. Over AF_XDP there is a bridge between them, which can lose frames.
    pub fn pair(mtu: u32) -> Lab {
        if is_xdp() {
            return Lab::bridged(2, mtu);
        }
        let machines = vec![machine(0, "host"), machine(1, "store")];
        let (host, store) = (&machines[0].namespace.name, &machines[1].namespace.name);
        run(&format!(
            "ip -n {host} link add {INTERFACE} mtu {mtu} type veth peer name {INTERFACE} mtu {mtu} netns {store}"
        ));
        Lab { machines, bridge: None }.up()
    }

    /// Takes the interfaces of both machines away and puts new ones, with other addresses, in their place.
    pub fn replace_wire(&self, mtu: u32) {
        let (host, store) = (&self.machines[0].namespace.name, &self.machines[1].namespace.name);
        let wires = if self.bridge.is_some() { &self.machines[..] } else { &self.machines[..1] };
        wires.iter().for_each(|end| _ = run(&format!("ip -n {} link del {INTERFACE}", end.namespace.name)));
        std::thread::sleep(std::time::Duration::from_millis(300));
        if self.bridge.is_some() {
            self.machines.iter().for_each(|machine| machine.plug(mtu));
        } else {
            run(&format!(
                "ip -n {host} link add {INTERFACE} mtu {mtu} type veth peer name {INTERFACE} mtu {mtu} netns {store}"
            ));
        }
        self.machines.iter().for_each(Machine::finish);
    }

    /// `count` machines on a bridge, which is in a namespace of its own.
    pub fn bridged(count: usize, mtu: u32) -> Lab {
        let bridge = Arc::new(Namespace::new("bridge"));
        run(&format!("ip -n {} link add bridge0 mtu {mtu} type bridge forward_delay 0", bridge.name));
        run(&format!("ip -n {} link set bridge0 up", bridge.name));
        let mut machines: Vec<Machine> = (0..count).map(|index| machine(index, "m")).collect();
        for (index, machine) in machines.iter_mut().enumerate() {
            machine.port = Some((Arc::clone(&bridge), format!("port{index}")));
            machine.plug(mtu);
        }
        Lab { machines, bridge: Some(bridge) }.up()
    }

    fn up(self) -> Lab {
        self.machines.iter().for_each(Machine::finish);
        self
    }

    /// Tells the bridge for good who is where, as a switch with port security knows it: nobody draws another's frames to himself by sending
    /// under its address.
    ///
    /// # Panics
    /// There is no bridge.
    pub fn fix_addresses(&self) {
        let bridge = self.bridge.as_ref().expect("machines on a bridge");
        for (index, machine) in self.machines.iter().enumerate() {
            bridge.shell(&format!("bridge link set dev port{index} learning off"));
            bridge.shell(&format!("bridge fdb replace {} dev port{index} master static", machine.mac()));
        }
    }

    /// The machine where guests and backends live.
    pub fn host(&self) -> &Machine {
        &self.machines[0]
    }

    /// The machine where nodes live.
    pub fn store(&self) -> &Machine {
        &self.machines[1]
    }

    /// All of them.
    pub fn machines(&self) -> &[Machine] {
        &self.machines
    }

    /// Where the bridge is, if there is one; its ports are `port0`, `port1`, ….
    pub fn bridge(&self) -> Option<&Namespace> {
        self.bridge.as_deref()
    }
}

/// The addresses of a lab's machines, in their order.
pub const ADDRESSES: [&str; 3] = ["10.77.0.1", "10.77.0.2", "10.77.0.3"];

fn machine(index: usize, label: &str) -> Machine {
    Machine { namespace: Namespace::new(label), address: ADDRESSES[index], port: None }
}

fn is_xdp() -> bool {
    matches!(link_mode(), Mode::Xdp | Mode::XdpCopy)
}

/// Removes the namespaces of test processes that are gone.
fn remove_left_over() {
    for path in left_over("/run/netns") {
        remove(&path.file_name().unwrap_or_default().to_string_lossy());
    }
}

/// What test processes that are gone have left in a folder.
pub(crate) fn left_over(folder: &str) -> Vec<PathBuf> {
    let gone = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        process.is_some_and(|process| !PathBuf::from("/proc").join(process).exists())
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(gone).collect()
}

fn remove(name: &str) {
    let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
}

/// Runs a program with arguments that hold no blanks.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split(' ');
    output(Command::new(words.next().expect("a program")).args(words), line)
}

/// Runs a shell command outside of every machine and gives what it printed.
///
/// # Panics
/// It failed.
pub fn shell(line: &str) -> String {
    output(Command::new("sh").args(["-c", line]), line)
}

pub(crate) fn output(command: &mut Command, line: &str) -> String {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| {
        panic!("'{line}' cannot be run: {error} (tests/install.sh installs what is needed)")
    });
    assert!(
        output.status.success(),
        "'{line}' failed ({}): {}\n(these tests need root)",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
