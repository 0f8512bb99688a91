package relay_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// inFlight bounds the messages that one lost connection or relay may repeat.
const inFlight = 1000 + 1

// brisk makes a relay notice and forget faults within a second or two.
func brisk(cfg *relay.Config, pub *relay.RabbitMQConfig) {
	cfg.Lease, pub.ConfirmTimeout, pub.WriteTimeout = 2*time.Second, time.Second, time.Second
}

// checkAll fails unless every message was delivered, unchanged in ID and type,
// with at most extra repetitions.
func (b *bundle) checkAll(got []amqp.Delivery, want []outbox.Message, extra int) {
	b.Helper()
	types := make(map[string]string)
	for _, m := range want {
		types[m.ID.String()] = m.Type
	}
	seen := make(map[string]bool)
	for _, d := range got {
		if typ, known := types[d.MessageId]; !known || typ != d.Type {
			b.Errorf("delivered %s of type %q, which was not written", d.MessageId, d.Type)
		}
		seen[d.MessageId] = true
	}
	if len(seen) != len(want) {
		b.Errorf("%d of %d messages delivered", len(seen), len(want))
	}
	if n := len(got) - len(seen); n > extra {
		b.Errorf("%d repetitions, at most %d may be", n, extra)
	}
}

// checkOrder fails if the first deliveries of a key are not in the order written.
func (b *bundle) checkOrder(got []amqp.Delivery, want []outbox.Message) {
	b.Helper()
	place := make(map[string]int)
	for i, m := range want {
		place[m.ID.String()] = i
	}
	seen, last := make(map[string]bool), make(map[any]int)
	for _, d := range got {
		key := d.Headers["outbox-key"]
		if key == nil || seen[d.MessageId] {
			continue
		}
		seen[d.MessageId] = true
		if before, ok := last[key]; ok && place[d.MessageId] < before {
			b.Errorf("key %v: message %d came after message %d", key, place[d.MessageId], before)
		}
		last[key] = place[d.MessageId]
	}
}

func TestRelayKilledMidBatchLosesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	msgs := b.messages(20_000, func(i int) string { return fmt.Sprint("k", i%100) })
	b.write(msgs...)
	const kills = 5
	for range kills {
		child := b.startChild()
		before := b.count("outbox")
		testenv.Eventually(b, 30*time.Second, "progress", func() bool { return b.count("outbox") < before })
		b.must(child.Kill())
	}
	if b.count("outbox") == 0 {
		t.Fatal("the relay had finished before it was killed, that shows nothing")
	}
	b.start(brisk)
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, kills*(inFlight+5000))
	b.checkOrder(got, msgs)
	t.Logf("%d kills, %d repetitions", kills, len(got)-len(msgs))
}

func TestUnroutableIsParkedAndGoesOutWhenItCan(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.must(b.ch.QueueUnbind(b.queue, "", b.queue, nil))
	msgs := b.messages(100, noKey)
	b.write(msgs...)
	r, _ := b.start()
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", 100)
	if s := r.Stats(); s.Published != 0 || s.Refused < 100 {
		t.Errorf("stats %+v", s)
	}
	var reason, lastError string
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT reason, last_error FROM "+b.db.Table("outbox_parked")+" LIMIT 1").Scan(&reason, &lastError))
	if reason != "retry" || lastError != "returned by the broker: 312 NO_ROUTE" {
		t.Errorf("parked as %s: %s", reason, lastError)
	}
	b.must(b.ch.QueueBind(b.queue, "", b.queue, false, nil))
	b.checkAll(b.drain(b.queue, len(msgs)), msgs, 0)
	b.eventuallyCount("outbox_parked", 0)
}

func TestMissingExchangeDoesNotDisturbItsNeighbours(t *testing.T) {
	t.Parallel()
	b := setup(t)
	absent := testenv.Name(t) + "'s \"own\" ex'change" // the broker quotes names in its errors
	msgs := b.messages(3000, noKey)
	var good, bad []outbox.Message
	for i := range msgs {
		if i%10 == 0 {
			msgs[i].Exchange = absent
			bad = append(bad, msgs[i])
		} else {
			good = append(good, msgs[i])
		}
	}
	b.write(msgs...)
	b.start()
	got := b.drain(b.queue, len(good))
	b.checkAll(got, good, inFlight)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", len(bad))
	var strangers, attempts int
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(*) FILTER (WHERE exchange <> $1), max(attempts) FROM "+b.db.Table("outbox_parked"), absent).
		Scan(&strangers, &attempts))
	if strangers > 0 {
		t.Errorf("%d neighbours were parked", strangers)
	}
	b.declare(absent)
	t.Cleanup(func() { b.ch.QueueDelete(absent, false, false, false); b.ch.ExchangeDelete(absent, false, false) })
	b.checkAll(b.drain(absent, len(bad)), bad, 0)
	b.eventuallyCount("outbox_parked", 0)
}

func TestNackedIsParkedAndGoesOutWhenTheQueueHasRoom(t *testing.T) {
	t.Parallel()
	b := setup(t)
	full := testenv.Name(t)
	_, err := b.ch.QueueDeclare(full, true, false, false, false, amqp.Table{"x-max-length": 1, "x-overflow": "reject-publish"})
	b.must(err)
	t.Cleanup(func() { b.ch.QueueDelete(full, false, false, false) })
	msgs := b.messages(20, noKey)
	for i := range msgs {
		msgs[i].Exchange, msgs[i].RoutingKey = "", full
	}
	b.write(msgs...)
	r, _ := b.start()
	b.eventuallyCount("outbox", 0)
	if s := r.Stats(); s.Refused == 0 {
		t.Errorf("nothing was refused: %+v", s)
	}
	b.checkAll(b.drain(full, len(msgs)), msgs, 0)
	b.eventuallyCount("outbox_parked", 0)
}

func TestMessageThatCannotBePublishedIsDeadAndHarmsNobody(t *testing.T) {
	t.Parallel()
	broker := serverstest.RabbitMQ(t)
	b := setupAt(t, testenv.DatabaseURL(t), broker.URL())
	// A broker that takes less than the producer was told: the channel closes.
	_, err := broker.Ctl(testenv.Context(t), "eval", "application:set_env(rabbit, max_message_size, 100000), "+
		"persistent_term:put(max_message_size, 100000).") // RabbitMQ 3.x, 4.x
	b.must(err)
	msgs := b.messages(2000, noKey)
	b.write(msgs...)
	big := outbox.Message{ID: outbox.NewID(), Exchange: b.queue, Payload: make([]byte, 200_000)}
	b.write(big)
	b.write(b.messages(1, noKey)...)
	b.start()
	b.eventuallyCount("outbox", 0)
	var reason, id string
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT reason, message_id::text FROM "+b.db.Table("outbox_parked")).Scan(&reason, &id))
	if reason != "dead" || id != big.ID.String() {
		t.Errorf("parked %s as %s", id, reason)
	}
	b.drain(b.queue, len(msgs)+1)
}

func TestTerminatedDatabaseSessionsCostNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r, _ := b.start(brisk)
	msgs := b.messages(20_000, func(i int) string { return fmt.Sprint("k", i%100) })
	b.write(msgs...)
	ctx := testenv.Context(t)
	for i := int64(1); i < 5; i++ {
		testenv.Eventually(t, 30*time.Second, "progress", func() bool { return r.Stats().Published >= i*2000 })
		_, err := b.db.Exec(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE pid <> pg_backend_pid() AND query LIKE '%' || $1 || '%'`, b.db.Schema)
		if err != nil {
			t.Logf("terminate: %v", err) // our own connection may be among those terminated before
		}
	}
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	b.eventuallyCount("outbox", 0)
}

// That is, a second after a message that is written at that time, however busy the machine is.
func TestScheduledMessageGoesOutWithinASecondOfItsTime(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.start()
	due := time.Now().Add(2 * time.Second).Truncate(time.Microsecond)
	b.write(outbox.Message{Exchange: b.queue, NotBefore: due}, outbox.Message{Exchange: b.queue, NotBefore: time.Now().Add(time.Hour)})
	deliveries, err := b.ch.Consume(b.queue, "", true, false, false, false, nil)
	b.must(err)
	select {
	case <-deliveries:
		t.Error("a message came before its time")
	case <-time.After(time.Until(due)):
	}
	b.write(outbox.Message{Exchange: b.queue, Type: "unscheduled"})
	next := func(limit time.Duration) (d amqp.Delivery) {
		select {
		case d = <-deliveries:
		case <-time.After(limit):
			t.Fatalf("nothing came within %s", limit)
		}
		return d
	}
	got := next(30 * time.Second)
	if got.Type == "unscheduled" {
		got = next(time.Second)
	}
	if created := got.Headers["outbox-created-at"]; created != due.UTC().Format("2006-01-02T15:04:05.000000Z07:00") {
		t.Errorf("created at %v, due %s", created, due)
	}
	b.eventuallyCount("outbox_parked", 1)
}

func TestStoppedRelayLeavesNothingInFlightAndTheNextStartsAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	msgs := b.messages(30_000, noKey)
	b.write(msgs...)
	first, stop := b.start()
	testenv.Eventually(t, 30*time.Second, "traffic", func() bool { return first.Stats().Published > 1000 })
	stop()
	if s := first.Stats(); s.Published == int64(len(msgs)) {
		t.Fatal("it had finished, that shows nothing")
	}
	var leased int
	b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(owner) FROM "+b.db.Table("outbox_lane")).Scan(&leased))
	if leased != 0 || b.count("outbox_relay") != 0 {
		t.Errorf("%d lanes still leased", leased)
	}
	b.start()
	b.checkAll(b.drain(b.queue, len(msgs)), msgs, 0)
}

func TestTwoRelaysShareTheLanesAndHandThemOver(t *testing.T) {
	t.Parallel()
	b := setup(t)
	first, stopFirst := b.start(brisk)
	testenv.Eventually(t, 10*time.Second, "all lanes", func() bool { return first.Stats().Lanes == 64 })
	second, _ := b.start(brisk)
	testenv.Eventually(t, 10*time.Second, "half the lanes each", func() bool {
		return first.Stats().Lanes == 32 && second.Stats().Lanes == 32
	})
	msgs := b.messages(20_000, func(i int) string { return fmt.Sprint("k", i%500) })
	b.write(msgs...)
	testenv.Eventually(t, 30*time.Second, "both work", func() bool {
		return first.Stats().Published > 100 && second.Stats().Published > 100
	})
	stopFirst()
	testenv.Eventually(t, 10*time.Second, "all lanes", func() bool { return second.Stats().Lanes == 64 })
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
}

func TestKilledRelaysLanesAreTakenOver(t *testing.T) {
	t.Parallel()
	b := setup(t)
	child := b.startChild()
	testenv.Eventually(t, 10*time.Second, "lanes leased", func() bool {
		var n int
		b.must(b.db.QueryRow(testenv.Context(t), "SELECT count(owner) FROM "+b.db.Table("outbox_lane")).Scan(&n))
		return n == 64
	})
	b.must(child.Kill())
	began := time.Now()
	next, _ := b.start(brisk)
	testenv.Eventually(t, 10*time.Second, "all lanes", func() bool { return next.Stats().Lanes == 64 })
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("takeover took %s with a lease of 1 s", took)
	}
}

// It has the database, the lease, and a wrong password for the broker.
func TestRelayThatCannotReachTheBrokerLeavesItsLanesToOthers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.start(brisk)
	good := b.amqpURL
	b.amqpURL = strings.Replace(good, "amqp://", "amqp://nobody:wrong@", 1)
	if _, after, ok := strings.Cut(good, "@"); ok {
		b.amqpURL = "amqp://nobody:wrong@" + after
	}
	bad, stopBad := b.start(brisk)
	b.amqpURL = good
	msgs := b.messages(500, tenKeys)
	for i := range 5 {
		b.write(msgs[i*100 : (i+1)*100]...)
		b.must(pauseFor(t, 500*time.Millisecond))
		if n := bad.Stats().Lanes; n != 0 {
			t.Errorf("it has %d lanes", n)
		}
	}
	b.eventuallyCount("outbox", 0)
	got := b.drain(b.queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	stopBad()
}

func TestRelayWaitsForTheSchemaAndRefusesAForeignOne(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx := testenv.Context(t)
	_, err := b.db.Exec(ctx, "ALTER TABLE "+b.db.Table("txbox_version")+" RENAME TO hidden")
	b.must(err)
	r, _ := b.start()
	testenv.Eventually(t, 10*time.Second, "Ready to tell", func() bool { return r.Ready() != nil })
	_, err = b.db.Exec(ctx, "ALTER TABLE "+b.db.Table("hidden")+" RENAME TO txbox_version")
	b.must(err)
	testenv.Eventually(t, 10*time.Second, "Ready", func() bool { return r.Ready() == nil })

	_, err = b.db.Exec(ctx, "UPDATE "+b.db.Table("txbox_version")+" SET version = 99, compatible_since = 99")
	b.must(err)
	pub, err := relay.RabbitMQ(b.amqpURL, relay.RabbitMQConfig{})
	b.must(err)
	refusing, err := relay.New(b.db.Pool, pub, relay.Config{Schema: b.db.Schema})
	b.must(err)
	if err := refusing.Run(context.Background()); err == nil {
		t.Error("Run accepted a schema that does not serve it")
	}
}
