package relay_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// One quorum queue stops confirming: its Raft process hangs. The others' messages
// go out, its own spend no attempt, and go out with no human when it works again.
func TestSilentQueueHoldsUpItsOwnMessagesAlone(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	silent := testenv.Name(t)
	b.declare(silent)
	eval := func(function string) {
		t.Helper()
		_, err := broker.Ctl(testenv.Context(t), "eval", fmt.Sprintf("sys:%s('%%2F_%s').", function, silent))
		b.must(err)
	}
	all := b.messages(10_000, func(i int) string { return fmt.Sprint("k", i%700) })
	var good, held []outbox.Message
	for i := range all {
		if i%7 == 3 { // the keys of one destination are not those of the other
			all[i].Exchange = silent
			held = append(held, all[i])
		} else {
			good = append(good, all[i])
		}
	}
	eval("suspend")
	b.write(all...)
	r, _ := b.start()
	b.checkAll(b.drain(b.queue, len(good)), good, inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", len(held))
	var spent int
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT sum(attempts) FROM "+b.db.Table("outbox_parked")).Scan(&spent))
	if spent != 0 {
		t.Errorf("%d attempts spent", spent)
	}
	b.must(r.Ready())
	eval("resume")
	got := b.drain(silent, len(held))
	b.checkAll(got, held, inFlight)
	b.checkOrder(got, held)
	b.eventuallyCount("outbox_parked", 0)
}

// Most queues are silent, from the start: the others' messages go out all the same.
func TestManySilentQueuesHoldUpTheirOwnMessagesAlone(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	const queues = 12
	var silent []string
	var suspend strings.Builder
	for range queues {
		name := testenv.Name(t)
		b.declare(name)
		silent = append(silent, name)
		fmt.Fprintf(&suspend, "sys:suspend('%%2F_%s'), ", name)
	}
	_, err := broker.Ctl(testenv.Context(t), "eval", suspend.String()+"ok.")
	b.must(err)
	all := b.messages(queues*200, noKey)
	var good, held []outbox.Message
	for i := range all {
		if i%(queues+1) < queues {
			all[i].Exchange = silent[i%(queues+1)]
			held = append(held, all[i])
		} else {
			good = append(good, all[i])
		}
	}
	b.write(all...)
	b.start()
	b.checkAll(b.drain(b.queue, len(good)), good, 4*inFlight)
	b.eventuallyCount("outbox", 0)
	if found := b.reasons(); found["retry"] != len(held) {
		t.Errorf("parked: %v", found)
	}
	_, err = broker.Ctl(testenv.Context(t), "eval", strings.ReplaceAll(suspend.String(), "suspend", "resume")+"ok.")
	b.must(err)
	b.eventuallyCount("outbox_parked", 0)
}

// Connections that are lost while a queue is silent are not the fault of its messages.
func TestSilentQueueAndLostConnectionsLetNothingDie(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	direct, err := url.Parse(b.amqpURL)
	b.must(err)
	way := newGate(t, direct.Host)
	b.amqpURL = way.url(*direct)
	silent := testenv.Name(t)
	b.declare(silent)
	eval := func(function string) {
		t.Helper()
		_, err := broker.Ctl(testenv.Context(t), "eval", fmt.Sprintf("sys:%s('%%2F_%s').", function, silent))
		b.must(err)
	}
	eval("suspend")
	held, good := b.messages(1, noKey), b.messages(200, noKey)
	for i := range held {
		held[i].Exchange = silent
	}
	r, _ := b.start(brisk)
	testenv.Eventually(t, 20*time.Second, "ready", func() bool { return r.Ready() == nil })
	b.write(append(held, good[:20]...)...)
	for i := range 12 { // sooner than it can tell that the queue is silent
		b.must(pauseFor(t, time.Second))
		b.write(good[20+2*i : 22+2*i]...) // others get through meanwhile
		way.shut()
		way.open()
	}
	b.write(good[44:]...)
	b.checkAll(b.drain(b.queue, len(good)), good, 4*inFlight)
	b.eventuallyCount("outbox", 0)
	if found := b.reasons(); found["retry"] != len(held) {
		t.Errorf("parked: %v", found)
	}
	eval("resume")
	b.checkAll(b.drain(silent, len(held)), held, 4*inFlight)
}

// A message the bytes of which make something on the way end the connection is
// found by halves; its neighbours get through and spend no attempt.
func TestMessageThatEndsConnectionsIsFoundAndItsNeighboursGetThrough(t *testing.T) {
	t.Parallel()
	b := setup(t)
	proxy := newPoisonProxy(t, b.amqpURL, "p0is0n")
	b.amqpURL = proxy.url
	msgs := b.messages(3000, noKey)
	poison := []int{17, 1500}
	for _, i := range poison {
		msgs[i].Payload = []byte("p0is0n")
	}
	b.write(msgs...)
	b.start(func(cfg *relay.Config, pub *relay.RabbitMQConfig) { pub.ConfirmTimeout = 5 * time.Second })
	var good []outbox.Message
	for i, m := range msgs {
		if i != poison[0] && i != poison[1] {
			good = append(good, m)
		}
	}
	// Each end of a connection repeats what was in flight.
	got := b.drain(b.queue, len(good))
	b.checkAll(got, good, int(proxy.ended.Load()+1)*inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", len(poison))
	var dead, spent int
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(*) FILTER (WHERE reason = 'dead'), sum(attempts) FROM "+b.db.Table("outbox_parked")).Scan(&dead, &spent))
	if dead != len(poison) || spent != len(poison) {
		t.Errorf("%d dead, %d attempts spent", dead, spent)
	}
	ended := proxy.ended.Load()
	t.Logf("%d connections ended", ended)
	if ended > 60 {
		t.Errorf("%d connections ended", ended)
	}
}

// A key that is written faster than the broker confirms it waits in the table: it
// holds up nobody else and stays in order.
func TestHotKeyHoldsUpNoOtherAndStaysInOrder(t *testing.T) {
	t.Parallel()
	b := setup(t)
	msgs := b.messages(6000, func(i int) string {
		if i < 5000 || i%2 == 0 {
			return "hot"
		}
		return fmt.Sprint("k", i)
	})
	b.write(msgs...)
	r, _ := b.start()
	var most atomic.Int64
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				most.Store(max(most.Load(), int64(r.Stats().InHand)))
			}
		}
	})
	got := b.drain(b.queue, len(msgs))
	close(stop)
	watching.Wait()
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	lastOther := 0
	for i, d := range got {
		if d.Headers["outbox-key"] != "hot" {
			lastOther = i
		}
	}
	if lastOther > len(msgs)/2 {
		t.Errorf("the last of the others came as number %d of %d", lastOther, len(msgs))
	}
	if most.Load() > 2500 {
		t.Errorf("%d messages in the hand", most.Load())
	}
	b.eventuallyCount("outbox", 0)
}

// poisonProxy forwards to a broker and ends each connection on which the poison
// comes, or, so many times, forwards nothing more.
type poisonProxy struct {
	url           string
	silent, ended atomic.Int64
}

func newPoisonProxy(t *testing.T, amqpURL, poison string) *poisonProxy {
	t.Helper()
	u, err := url.Parse(amqpURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &poisonProxy{url: strings.Replace(amqpURL, u.Host, listener.Addr().String(), 1)}
	var conns sync.WaitGroup
	forward := func(client net.Conn) {
		defer client.Close()
		broker, err := net.Dial("tcp", u.Host)
		if err != nil {
			return
		}
		defer broker.Close()
		conns.Go(func() { io.Copy(client, broker); client.Close() })
		buffer := make([]byte, 64<<10)
		for {
			n, err := client.Read(buffer)
			if bytes.Contains(buffer[:n], []byte(poison)) {
				if p.silent.Add(-1) >= 0 {
					io.Copy(io.Discard, client)
				}
				p.ended.Add(1)
				return
			}
			if _, failed := broker.Write(buffer[:n]); err != nil || failed != nil {
				return
			}
		}
	}
	conns.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { forward(client) })
		}
	})
	t.Cleanup(func() { listener.Close(); conns.Wait() })
	return p
}
