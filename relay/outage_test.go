package relay_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers"
	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// resumeWithin is how soon after the end of an outage messages flow again.
const resumeWithin = 5 * time.Second

// outage is one in which a relay may be, and by what means.
type outage struct {
	*bundle
	relay *relay.Relay
	log   *lockedBuffer
	stop  func()
	sent  []outbox.Message
}

// outageAt starts a relay and sees it publish.
func outageAt(b *bundle, change ...func(*relay.Config, *relay.RabbitMQConfig)) *outage {
	b.Helper()
	o := &outage{bundle: b, log: &lockedBuffer{}}
	o.relay, o.stop = b.start(append(change, b.logTo(o.log))...)
	o.writeMore(200)
	testenv.Eventually(b, 20*time.Second, "it publishes", func() bool { return o.relay.Stats().Published >= int64(len(o.sent)) })
	return o
}

// writeMore writes messages that the outage meets.
func (o *outage) writeMore(n int) {
	o.Helper()
	msgs := o.messages(n, func(i int) string { return fmt.Sprint("k", i%10) })
	o.write(msgs...)
	o.sent = append(o.sent, msgs...)
}

// notReady waits until Ready says so, in words that hold what.
func (o *outage) notReady(what string) {
	o.Helper()
	testenv.Eventually(o, 20*time.Second, "not ready", func() bool { return o.relay.Ready() != nil })
	if err := o.relay.Ready(); err == nil || !strings.Contains(err.Error(), what) {
		o.Errorf("%q is not in Ready: %v", what, err)
	}
}

// over checks that messages flow soon after the end of the outage, that it has spent no
// attempt, and that the log tells of it in few lines.
func (o *outage) over(lines int) {
	o.Helper()
	before, ended := o.relay.Stats().Published, time.Now()
	testenv.Eventually(o, 30*time.Second, "messages flow", func() bool { return o.relay.Stats().Published > before })
	if took := time.Since(ended); took > resumeWithin {
		o.Errorf("resumed after %s", took)
	}
	got := o.drain(o.queue, len(o.sent))
	o.checkAll(got, o.sent, inFlight)
	o.checkOrder(got, o.sent)
	o.eventuallyCount("outbox", 0)
	o.must(o.relay.Ready())
	if n := o.count("outbox_parked"); n != 0 {
		o.Errorf("%d messages were parked", n)
	}
	if s := o.relay.Stats(); s.Refused != 0 {
		o.Errorf("%d messages were refused", s.Refused)
	}
	lines += 4 * int(o.relay.Stats().LeaseLost) // of a lease on a busy machine: it fails, it ended, it works, lanes are owned
	if n := o.log.lines(""); n > lines {
		o.Errorf("%d lines in the log, at most %d may be", n, lines)
	}
}

// A broker that stands still for longer than the relay waits for answers, while more
// is written than sockets hold.
func TestFrozenBrokerCostsNothing(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	o := outageAt(setupAt(t, testenv.DatabaseURL(t), broker.URL()))
	o.must(broker.Pause())
	frozen := time.NewTimer(20 * time.Second)
	for range 20 {
		o.writeMore(1000)
	}
	o.notReady("broker")
	<-frozen.C
	o.must(broker.Resume())
	o.connect() // the test's own connection has ended too
	o.over(14)
}

func TestBrokerRestartCostsNothing(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	b.must(broker.Sync(testenv.Context(t)))
	o := outageAt(b, brisk)
	for range 10 {
		o.writeMore(1000)
	}
	o.must(broker.Kill())
	o.notReady("broker")
	o.must(broker.Start(testenv.Context(t)))
	o.connect()
	o.over(14)
}

// A broker that is out of memory or disk stops reading from those who publish. Nothing
// is lost, repeated or spent, a relay can be stopped meanwhile, and all goes on soon
// after. So does it after a change of password.
func TestAlarmsAndRotatedPasswordCostNothing(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	ctl := func(args ...string) {
		t.Helper()
		_, err := broker.Ctl(testenv.Context(t), args...)
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, alarm := range []struct{ name, set, clear string }{
		{"memory", "0.0000001", "0.4"},
		{"disk", "1000000GB", "50MB"},
	} {
		t.Run(alarm.name, func(t *testing.T) {
			command := map[string]string{"memory": "set_vm_memory_high_watermark", "disk": "set_disk_free_limit"}[alarm.name]
			o := outageAt(setupAt(t, testenv.DatabaseURL(t), broker.URL()), func(_ *relay.Config, pub *relay.RabbitMQConfig) {
				pub.ConfirmTimeout, pub.WriteTimeout = 4*time.Second, time.Second
			})
			ctl(command, alarm.set)
			defer ctl(command, alarm.clear)
			large := o.messages(8, noKey)
			for i := range large {
				large[i].Payload = make([]byte, 4<<20) // more than a socket takes
			}
			o.write(large...) // the broker stops reading as the first of them begins
			o.sent = append(o.sent, large...)
			o.notReady(alarm.name)
			o.must(pauseFor(t, 5*time.Second)) // longer than ConfirmTimeout
			o.writeMore(200)
			ctl(command, alarm.clear)
			o.over(14)
			if n := o.relay.Stats().Unknown; n != 0 {
				t.Errorf("%d messages were repeated", n)
			}
		})
	}
	t.Run("stop", func(t *testing.T) { stopDuringAlarm(t, broker, ctl) })
	t.Run("password", func(t *testing.T) { rotatePassword(t, broker, ctl) })
}

func stopDuringAlarm(t *testing.T, broker *servers.RabbitMQ, ctl func(...string)) {
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	ctl("set_vm_memory_high_watermark", "0.0000001")
	defer ctl("set_vm_memory_high_watermark", "0.4")
	msgs := b.messages(500, func(i int) string { return fmt.Sprint("k", i%7) })
	b.write(msgs...)
	pub, err := relay.RabbitMQ(b.amqpURL, relay.RabbitMQConfig{})
	b.must(err)
	r, err := relay.New(b.db.Pool, pub, relay.Config{
		Schema: b.db.Schema, StopTimeout: time.Second, Logger: slog.New(slog.NewTextHandler(b.Output(), nil)),
	})
	b.must(err)
	ctx, cancel := context.WithCancel(testenv.Context(t))
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	testenv.Eventually(t, 20*time.Second, "blocked", func() bool {
		err := r.Ready()
		return err != nil && strings.Contains(err.Error(), "takes no messages")
	})
	cancel()
	select {
	case err := <-done:
		t.Logf("Run: %v", err) // an error if something was in flight
	case <-time.After(5 * time.Second):
		t.Fatal("Run goes on, with a StopTimeout of 1 s")
	}
	ctl("set_vm_memory_high_watermark", "0.4")
	b.start()
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, inFlight)
	b.checkOrder(got, msgs)
}

func rotatePassword(t *testing.T, broker *servers.RabbitMQ, ctl func(...string)) {
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	const user = "rotated"
	ctl("add_user", user, "first")
	defer ctl("delete_user", user)
	ctl("set_permissions", user, ".*", ".*", ".*")
	var password atomic.Value
	password.Store("first")
	o := outageAt(b, func(_ *relay.Config, pub *relay.RabbitMQConfig) {
		pub.Credentials = func(context.Context) (string, string, error) { return user, password.Load().(string), nil }
	})
	ctl("change_password", user, "second")
	ctl("close_all_user_connections", user, "rotated")
	o.writeMore(200)
	o.notReady("broker")
	o.must(pauseFor(t, time.Second))
	password.Store("second")
	o.over(14)
}

// The first host of the list is down; later the one that served goes, and another
// takes its place.
func TestRelayGoesOnWithAnotherHost(t *testing.T) {
	t.Parallel()
	b := setup(t)
	direct, err := url.Parse(b.amqpURL)
	b.must(err)
	first, second := newGate(t, direct.Host), newGate(t, direct.Host)
	second.shut()
	nobody := *direct
	nobody.Host = "127.0.0.1:1"
	b.amqpURL = strings.Join([]string{nobody.String(), first.url(*direct), second.url(*direct)}, ",")
	o := outageAt(b, brisk)
	first.shut()
	o.writeMore(200)
	o.notReady("broker")
	second.open()
	o.over(14)
}

// gate forwards to a host while it is open.
type gate struct {
	listener net.Listener
	mu       sync.Mutex
	closed   bool
	conns    map[net.Conn]bool
}

func newGate(t *testing.T, host string) *gate {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{listener: listener, conns: make(map[net.Conn]bool)}
	var forwarding sync.WaitGroup
	forwarding.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			forwarding.Go(func() { g.forward(client, host) })
		}
	})
	t.Cleanup(func() { listener.Close(); g.shut(); forwarding.Wait() })
	return g
}

func (g *gate) url(u url.URL) string {
	u.Host = g.listener.Addr().String()
	return u.String()
}

// hold registers a connection; it returns false if the gate is shut.
func (g *gate) hold(conn net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.conns[conn] = true
	}
	return !g.closed
}

func (g *gate) forward(client net.Conn, host string) {
	defer client.Close()
	if !g.hold(client) {
		return
	}
	server, err := net.Dial("tcp", host)
	if err != nil {
		return
	}
	var back sync.WaitGroup
	back.Go(func() { io.Copy(client, server); client.Close() })
	io.Copy(server, client)
	server.Close()
	back.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, client)
}

// shut ends all connections, and new ones at once.
func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for conn := range g.conns {
		conn.Close()
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = false
}
