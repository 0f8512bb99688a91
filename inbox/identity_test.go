package inbox_test

import (
	"context"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

func TestMessagesBeyondTheHorizonAreParked(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	old, young := time.Now().Add(-2*time.Hour), time.Now().Add(-30*time.Minute)
	b.publish(t, amqp.Publishing{MessageId: "old", Timestamp: old}, amqp.Publishing{MessageId: "old", Timestamp: old},
		amqp.Publishing{MessageId: "young", Timestamp: young}, amqp.Publishing{MessageId: "neither"})
	cfg := b.config(t)
	cfg.Horizon = time.Hour
	c := b.run(t, b.Pool, testenv.AMQPURL(t), b.apply, cfg)
	c.waitFor(t, "settled", func(s inbox.Stats) bool { return s.Applied == 2 && s.Parked["too_old"] == 1 })
	c.stop()
	b.wantReady(t, 0)
	b.want(t, "old", 0, 0)
	if n := b.count(t, "inbox_parked", "reason = 'too_old' AND message_id = 'old'"); n != 1 {
		t.Errorf("%d parked", n)
	}
}

func TestAnIDThatComesWithAnotherBodyIsParked(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	c := b.start(t, b.apply)
	for i, body := range []string{"a", "a", "b", "b"} {
		b.publish(t, amqp.Publishing{MessageId: "m", Body: []byte(body)})
		if i == 0 { // without a key the workers are in no order
			c.waitFor(t, "applied", func(s inbox.Stats) bool { return s.Applied == 1 })
		}
	}
	c.waitFor(t, "settled", func(s inbox.Stats) bool {
		return s.Applied == 1 && s.Duplicates == 1 && s.Parked["id_conflict"] == 1
	})
	b.wantReady(t, 0)
	c.stop()
	b.want(t, "m", 1, 1)
	if n := b.count(t, "inbox_parked", "reason = 'id_conflict' AND message_id = 'm' AND body = 'b'"); n != 1 {
		t.Errorf("%d parked", n)
	}
}

func TestOneNameOnTwoQueuesIsRefused(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	first := b.start(t, b.apply)
	first.waitReady(t)
	other, err := inbox.NewConsumer(b.Pool, testenv.AMQPURL(t), b.queue+"_other", b.apply, b.config(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Run(b.ctx); err == nil {
		t.Error("it runs")
	}
	first.stop()
	ctx, cancel := context.WithCancel(b.ctx)
	cancel()
	if err := other.Run(ctx); err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
}
