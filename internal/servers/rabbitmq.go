package servers

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// RabbitMQ is a private RabbitMQ node with an epmd (Erlang's port mapper) of its
// own. Its files lie in Dir; where the server's user cannot enter Dir, Dir is a
// link to a folder under /var/tmp.
type RabbitMQ struct {
	Dir string
	// Port is the TCP port of AMQP on 127.0.0.1; the next two belong to Erlang.
	// Zero is the port that Dir had before, or at the first Start a free one;
	// Start then sets it.
	Port int
}

// RabbitMQPackage is the Debian package with the server.
const RabbitMQPackage = "rabbitmq-server"

// Start returns when the server accepts AMQP connections, after some 5 s. It
// installs the package if it is missing, initialises Dir if it is new, recovers from
// a crash, and does nothing if the server serves already. Ending ctx undoes a
// start that has not succeeded.
func (r *RabbitMQ) Start(ctx context.Context) error {
	if !r.Installed() {
		if err := Install(ctx, RabbitMQPackage); err != nil {
			return err
		}
	}
	return r.find().do("start RabbitMQ", func(s instance) error {
		if err := s.start(ctx); err != nil || s.read(nodeFile) != "" {
			return err
		}
		return s.write(nodeFile, s.node())
	})
}

// Stop shuts the node down. It leaves no process, epmd included, also if ctx ends
// first: then as Kill does.
func (r *RabbitMQ) Stop(ctx context.Context) error {
	return r.find().end("stop RabbitMQ", func(s instance) error { return s.stopAll(ctx) })
}

// Kill ends all processes of the node at once, as a crash does; see Sync.
func (r *RabbitMQ) Kill() error { return r.find().end("kill RabbitMQ", instance.kill) }

// Pause halts all processes of the node until Resume, Start, Stop or Kill:
// connections stay open and nothing answers.
func (r *RabbitMQ) Pause() error { return r.find().do("pause RabbitMQ", instance.pause) }

// Resume undoes Pause.
func (r *RabbitMQ) Resume() error { return r.find().do("resume RabbitMQ", instance.resume) }

// Remove stops the node and deletes its files.
func (r *RabbitMQ) Remove(ctx context.Context) error {
	return r.find().end("remove RabbitMQ", func(s instance) error { return s.remove(ctx) })
}

// Ready is nil if the node completes an AMQP handshake within two seconds.
func (r *RabbitMQ) Ready(ctx context.Context) error {
	return r.find().do("RabbitMQ", func(s instance) error { return s.ready(ctx) })
}

// URL is for the virtual host "/", as the administrator guest. It needs Port or a
// Start, of this or of an earlier process.
func (r *RabbitMQ) URL() string {
	s, err := r.instance()
	if err != nil { // no server yet, so no port that Dir could remember
		return rabbitURL(r.Port)
	}
	return s.url(s.knownPort())
}

func rabbitURL(port int) string { return "amqp://guest:guest@" + loopback(port) + "/" }

// Installed reports whether the server's programs are there.
func (r *RabbitMQ) Installed() bool {
	_, err := rabbitBin()
	return err == nil
}

// Ctl runs rabbitmqctl against the node and returns what it printed, which is also
// part of the error. It takes about a second. Ending ctx kills rabbitmqctl.
func (r *RabbitMQ) Ctl(ctx context.Context, args ...string) (string, error) {
	var output string
	err := r.find().do("rabbitmqctl", func(s instance) error {
		bin, err := rabbitBin()
		if err != nil {
			return err
		}
		argv := append([]string{filepath.Join(bin, "rabbitmqctl")}, args...)
		output, err = s.run(s.command(ctx, s.rabbitEnvironment(), argv...))
		return err
	})
	return output, err
}

// Sync puts on disk what the node itself writes there only twice a second: a
// quorum queue that is declared and then hit by Kill within half a second is
// there again after Start, but never confirms or delivers (RabbitMQ 3.10 forgets
// which of its processes to start for it).
func (r *RabbitMQ) Sync(ctx context.Context) error {
	_, err := r.Ctl(ctx, "eval", "[dets:sync(Table) || Table <- dets:all()].")
	return err
}

func (r *RabbitMQ) find() finder { return r.instance }

func (r *RabbitMQ) instance() (instance, error) {
	at, err := locate(r.Dir, "rabbitmq")
	return instance{
		place: at, port: &r.Port, ports: 3, url: rabbitURL,
		stop:   syscall.SIGTERM,
		launch: launchRabbitMQ, check: CheckBroker,
	}, err
}

// CheckBroker is nil if the server behind url completes the handshake before ctx
// ends, or within two seconds. The error does not hold the password.
func CheckBroker(ctx context.Context, url string) error {
	if _, err := amqp.ParseURI(url); err != nil {
		return errors.New("malformed; percent-encode special characters in user, password and virtual host")
	}
	var raw net.Conn
	conn, err := amqp.DialConfig(url, amqp.Config{Dial: func(network, addr string) (net.Conn, error) {
		dialed, err := (&net.Dialer{Timeout: probeLimit}).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		raw = dialed
		return raw, raw.SetDeadline(time.Now().Add(probeLimit)) // the client clears it after the handshake
	}})
	if raw != nil {
		defer raw.Close() // a server that hangs now does not hold us
	}
	if err != nil {
		return err
	}
	return conn.CloseDeadline(time.Now().Add(probeLimit))
}

// nodeFile holds the node's name. It is written when the node has served for the
// first time: data without it are those of a first boot that did not succeed.
// A name of its own would not be needed, as each node has its own epmd; kept in a
// file it survives a change of port, which the data would not.
const nodeFile = "node"

func (s instance) node() string {
	if name := s.read(nodeFile); name != "" {
		return name
	}
	return fmt.Sprintf("txbox%d@localhost", s.knownPort())
}

func rabbitMark(id string) string { return "-" + id }

func epmdTitle(id string) string { return "epmd " + id }

const rabbitConfig = `# No alarm by accident: the default for disk is made for servers in production.
disk_free_limit.absolute = 50MB
vm_memory_high_watermark.relative = 0.6
`

func launchRabbitMQ(_ context.Context, s instance) (<-chan error, error) {
	bin, err := rabbitBin()
	if err != nil {
		return nil, err
	}
	if s.read(nodeFile) == "" {
		if err := os.RemoveAll(s.path("data")); err != nil {
			return nil, err
		}
		if err := s.write(".erlang.cookie", rand.Text()); err != nil {
			return nil, err
		}
	}
	for name, content := range map[string]string{"rabbitmq.conf": rabbitConfig, "enabled_plugins": "[].\n"} {
		if err := s.write(name, content); err != nil {
			return nil, err
		}
	}
	// A node would start epmd as a daemon that nobody can tell from the others.
	epmd := s.command(context.Background(), s.rabbitEnvironment(), "epmd")
	epmd.Args[0] = epmdTitle(s.id)
	if _, err := s.detach(epmd); err != nil {
		return nil, err
	}
	return s.detach(s.command(context.Background(), s.rabbitEnvironment(),
		filepath.Join(bin, "rabbitmq-server"), "-noinput", rabbitMark(s.id)))
}

// rabbitEnvironment is for the node, epmd and rabbitmqctl alike.
func (s instance) rabbitEnvironment() []string {
	port := s.knownPort()
	return []string{
		"ERL_EPMD_ADDRESS=127.0.0.1",
		fmt.Sprintf("ERL_EPMD_PORT=%d", port+2),
		"ERL_FLAGS=-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
		"RABBITMQ_NODENAME=" + s.node(),
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		fmt.Sprintf("RABBITMQ_NODE_PORT=%d", port),
		fmt.Sprintf("RABBITMQ_DIST_PORT=%d", port+1),
		"RABBITMQ_CTL_DIST_PORT_MIN=0", "RABBITMQ_CTL_DIST_PORT_MAX=0", // any free one
		"RABBITMQ_CONF_ENV_FILE=" + s.path("rabbitmq-env.conf"),
		"RABBITMQ_CONFIG_FILE=" + s.path("rabbitmq.conf"),
		"RABBITMQ_CONFIG_FILES=" + s.path("conf.d"),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + s.path("advanced.config"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + s.path("enabled_plugins"),
		"RABBITMQ_PLUGINS_EXPAND_DIR=" + s.path("plugins"),
		"RABBITMQ_GENERATED_CONFIG_DIR=" + s.path("generated"),
		"RABBITMQ_MNESIA_BASE=" + s.path("data"),
		"RABBITMQ_MNESIA_DIR=" + s.path("data/node"),
		"RABBITMQ_PID_FILE=" + s.path("data/pid"),
		"RABBITMQ_LOG_BASE=" + s.home,
		"RABBITMQ_LOGS=" + s.path("rabbitmq.log"),
		// Schedulers that neither spin when idle nor hold a core: other servers,
		// and the tests, run on the same ones.
		"RABBITMQ_SCHEDULER_BIND_TYPE=u",
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+sbwt none +sbwtdcpu none +sbwtdio none",
		// The start script then becomes the node, in place of a shell that waits for it.
		"RABBITMQ_ALLOW_INPUT=true",
	}
}
