package relay_test

import (
	"fmt"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
	"github.com/txbox/txbox/relay"
)

// tenKeys spreads messages over ten keys.
func tenKeys(i int) string { return fmt.Sprint(i % 10) }

// absent returns the name of a queue that does not exist, and what declares it.
func (b *bundle) absent() (name string, declare func()) {
	b.Helper()
	name = testenv.Name(b.T)
	return name, func() {
		b.Helper()
		_, err := b.ch.QueueDeclare(name, true, false, false, false, nil)
		b.must(err)
		b.Cleanup(func() { b.ch.QueueDelete(name, false, false, false) })
	}
}

// to sends messages to a queue by the default exchange.
func to(queue string, msgs []outbox.Message) []outbox.Message {
	for i := range msgs {
		msgs[i].Exchange, msgs[i].RoutingKey = "", queue
	}
	return msgs
}

// reasons returns how many messages are parked for which reason.
func (b *bundle) reasons() map[string]int {
	b.Helper()
	rows, err := b.db.Query(testenv.Context(b.T), "SELECT reason, count(*)::int FROM "+b.db.Table("outbox_parked")+" GROUP BY 1")
	b.must(err)
	defer rows.Close()
	found := make(map[string]int)
	for rows.Next() {
		var reason string
		var n int
		b.must(rows.Scan(&reason, &n))
		found[reason] = n
	}
	b.must(rows.Err())
	return found
}

// A relay that starts later finds the keys blocked.
func TestFollowersWaitBehindARefusedMessageAndAreSentInOrder(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, declare := b.absent()
	msgs := to(queue, b.messages(500, tenKeys))
	b.write(msgs[:200]...)
	others := b.messages(1000, func(i int) string { return fmt.Sprint("other-", i%10) })
	b.write(others...)
	_, stop := b.start(brisk)
	got := b.drain(b.queue, len(others))
	b.checkAll(got, others, 0)
	b.checkOrder(got, others)
	b.eventuallyCount("outbox", 0)
	if r := b.reasons(); r["retry"] != 10 || r["blocked"] != 190 {
		t.Errorf("parked %v, want the heads of ten keys and what follows them", r)
	}
	stop()

	b.write(msgs[200:300]...)
	declare()
	_, err := b.db.Exec(testenv.Context(t), "UPDATE "+b.db.Table("outbox_parked")+" SET due_at = now() + interval '3 seconds' WHERE reason = 'retry'")
	b.must(err)
	b.start(brisk)
	b.eventuallyCount("outbox", 0)
	if r := b.reasons(); r["retry"] != 10 || r["blocked"] != 290 {
		t.Errorf("parked %v", r)
	}
	for i := 300; i < len(msgs); i += 10 { // while the keys are being opened
		b.write(msgs[i : i+10]...)
	}
	got = b.drain(queue, len(msgs))
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	b.eventuallyCount("outbox_parked", 0)
}

// Every nack blocks the key again, in the midst of its followers.
func TestOrderIsKeptThroughManyRefusals(t *testing.T) {
	t.Parallel()
	b := setup(t)
	full := testenv.Name(t)
	_, err := b.ch.QueueDeclare(full, true, false, false, false, amqp.Table{"x-max-length": 3, "x-overflow": "reject-publish"})
	b.must(err)
	t.Cleanup(func() { b.ch.QueueDelete(full, false, false, false) })
	msgs := to(full, b.messages(60, func(i int) string { return fmt.Sprint(i % 3) }))
	b.write(msgs...)
	r, _ := b.start(brisk)
	b.eventuallyCount("outbox", 0)
	var got []amqp.Delivery
	testenv.Eventually(t, time.Minute, "all are delivered", func() bool {
		d, ok, err := b.ch.Get(full, true)
		b.must(err)
		if ok {
			got = append(got, d)
		}
		return len(got) == len(msgs)
	})
	b.checkAll(got, msgs, 0)
	b.checkOrder(got, msgs)
	if s := r.Stats(); s.Refused < 4 {
		t.Errorf("only %d were refused", s.Refused)
	}
}

func TestDeadHeadHoldsItsFollowersUntilItIsDiscardedOrSent(t *testing.T) {
	t.Parallel()
	const dueEvery = 500 * time.Millisecond
	for _, c := range []struct{ name, sql string }{
		{"discarded", "DELETE FROM %s WHERE reason = 'dead'"},
		{"sent", "UPDATE %s SET reason = 'retry', due_at = now(), parked_at = now() WHERE reason = 'dead'"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			queue, declare := b.absent()
			msgs := b.messages(50, func(int) string { return "key" })
			to(queue, msgs[:1])
			b.write(msgs...)
			b.start(brisk, func(cfg *relay.Config, _ *relay.RabbitMQConfig) { cfg.RetryFor = time.Millisecond })
			testenv.Eventually(t, 30*time.Second, "it is dead", func() bool { return b.reasons()["dead"] == 1 })
			b.eventuallyCount("outbox", 0)
			if r := b.reasons(); r["blocked"] != len(msgs)-1 {
				t.Errorf("parked %v", r)
			}
			declare()
			// Somebody takes the last for the one to send.
			_, err := b.db.Exec(testenv.Context(t), fmt.Sprintf(
				"UPDATE %[1]s SET reason = 'retry', due_at = now() WHERE id = (SELECT max(id) FROM %[1]s)", b.db.Table("outbox_parked")))
			b.must(err)
			b.must(pauseFor(t, 2*dueEvery))
			_, err = b.db.Exec(testenv.Context(t), fmt.Sprintf(c.sql, b.db.Table("outbox_parked")))
			b.must(err)
			got := b.drain(b.queue, len(msgs)-1)
			b.checkAll(got, msgs[1:], 0)
			b.checkOrder(got, msgs)
			b.eventuallyCount("outbox_parked", 0)
			more := b.messages(1, func(int) string { return "key" })
			b.write(more...)
			b.checkAll(b.drain(b.queue, 1), more, 0)
		})
	}
}

// 5,000 messages wait behind one that cannot be sent; the others pass.
func TestBlockedKeyDelaysNoOther(t *testing.T) {
	t.Parallel()
	b := setup(t)
	queue, _ := b.absent()
	followers := b.messages(5000, func(int) string { return "blocked" })
	b.write(append(to(queue, b.messages(1, func(int) string { return "blocked" })), followers...)...)
	others := b.messages(5000, func(i int) string { return fmt.Sprint(i % 100) })
	b.write(others...)
	b.start(brisk)
	got := b.drain(b.queue, len(others))
	b.checkAll(got, others, 0)
	b.checkOrder(got, others)
	b.eventuallyCount("outbox", 0)
	b.eventuallyCount("outbox_parked", len(followers)+1)
}
