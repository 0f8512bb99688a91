package inbox_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
)

func TestADeliveryWhoseAckWasLostIsADuplicate(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(1)...)
	server := newProxy(t, testenv.AMQPURL(t))
	var broken atomic.Bool
	server.onWrite = func(sent []byte) (cut, swallow bool) {
		return bytes.Contains(sent, []byte("\x00\x3c\x00\x50")) && broken.CompareAndSwap(false, true), false // basic.ack
	}
	c := b.run(t, b.Pool, server.url, b.apply, b.config(t))
	c.waitFor(t, "duplicate dropped", func(s inbox.Stats) bool { return s.Duplicates == 1 })
	if s := c.Stats(); s.Applied != 1 || s.Reconnects != 1 {
		t.Errorf("%+v", s)
	}
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, 1)
}

func TestADatabaseKilledWhileAMessageIsHandledLosesNothing(t *testing.T) {
	t.Parallel()
	postgres := serverstest.Postgres(t)
	b := setupBrokerOf(t, setupAt(t, postgres.URL()), testenv.AMQPURL(t))
	b.publish(t, numbered(3)...)
	cfg := b.config(t)
	cfg.Workers = 1
	inHand, goOn := make(chan struct{}), make(chan struct{})
	var calls atomic.Int64
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if err := b.apply(ctx, tx, m); err != nil {
			return err
		}
		if m.ID == "1" && calls.Add(1) == 1 {
			close(inHand)
			<-goOn
		}
		return nil
	}, cfg)
	<-inHand
	if err := postgres.Kill(); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	c.waitNotReady(t, "the database")
	if s := c.Stats(); s.Applied != 1 || s.Failures != 0 {
		t.Errorf("while it is away: %+v", s)
	}
	if err := postgres.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 3 })
	c.waitReady(t)
	if s := c.Stats(); s.Failures+s.Duplicates != 0 {
		t.Errorf("an outage cost attempts: %+v", s)
	}
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, 3)
}

func TestABrokerKilledWhileAMessageIsHandledLosesNothing(t *testing.T) {
	t.Parallel()
	rabbit := serverstest.RabbitMQ(t)
	b := setupBroker(t)
	cfg := b.config(t)
	cfg.Setup = func(ch *amqp.Channel) error { // on the broker that is killed
		if _, err := ch.QueueDeclare(b.queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
			return err
		}
		return ch.Publish("", b.queue, true, false, amqp.Publishing{MessageId: "0", DeliveryMode: amqp.Persistent})
	}
	inHand, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	c := b.run(t, b.Pool, rabbit.URL(), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		once.Do(func() { close(inHand) })
		<-goOn
		return b.apply(ctx, tx, m)
	}, cfg)
	<-inHand
	if err := rabbit.Sync(b.ctx); err != nil {
		t.Fatal(err)
	}
	if err := rabbit.Kill(); err != nil {
		t.Fatal(err)
	}
	c.waitNotReady(t, "RabbitMQ")
	close(goOn)
	c.waitFor(t, "applied while it is away", func(s inbox.Stats) bool { return s.Applied == 1 })
	if err := rabbit.Start(b.ctx); err != nil {
		t.Fatal(err)
	}
	// The first publish again, unless the broker lost it, and that of the new connection.
	c.waitFor(t, "duplicate dropped", func(s inbox.Stats) bool { return s.Duplicates >= 1 && s.Connected })
	c.stop()
	b.wantOneEffectEach(t, 1)
}

const (
	queueVar  = "INBOX_TEST_QUEUE" // set: the process is a consumer, to be killed
	schemaVar = "INBOX_TEST_SCHEMA"
	inHandMsg = "in hand"
)

// consumeForEver leaves each message's effect uncommitted.
func consumeForEver(queue string) {
	ctx := context.Background()
	db, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	schema := os.Getenv(schemaVar)
	c, err := inbox.NewConsumer(db, os.Getenv("AMQP_URL"), queue, func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if _, err := tx.Exec(ctx, "INSERT INTO "+pgx.Identifier{schema, "effects"}.Sanitize()+" VALUES ($1)", m.ID); err != nil {
			return err
		}
		fmt.Println(inHandMsg)
		<-ctx.Done()
		return ctx.Err()
	}, inbox.Config{Name: consumer, Schema: schema})
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(c.Run(ctx))
}

func TestAConsumerThatIsKilledLeavesItsMessagesToTheNext(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	const n = 10
	b.publish(t, numbered(n)...)
	process := exec.CommandContext(b.ctx, os.Args[0])
	process.Env = append(os.Environ(), queueVar+"="+b.queue, schemaVar+"="+b.DB.Schema)
	stdout, err := process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != inHandMsg {
		t.Errorf("%q, %v", line, err)
	}
	if err := process.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := process.Wait(); !errors.As(err, new(*exec.ExitError)) {
		t.Errorf("ended: %v", err)
	}
	c := b.start(t, b.apply)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == n })
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, n)
}

// What comes back from a classic queue, or many times from a quorum queue, is handled from
// the table, where its attempts are counted.
func TestWhatMayHaveKilledAProcessIsCounted(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	b.publish(t, numbered(5)...)
	for range 4 { // it is given back, as when a process dies
		var all []amqp.Delivery
		testenv.Eventually(t, testLimit, "all are to be had", func() bool {
			d, ok, err := b.Get(b.queue, false)
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				all = append(all, d)
			}
			return len(all) == 5
		})
		for _, d := range all {
			if err := d.Nack(false, true); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := b.start(t, b.apply)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 5 })
	if s := c.Stats(); s.Parked["retry"] != 5 || s.Failures != 0 {
		t.Errorf("%+v", s)
	}
	c.stop()
	b.wantReady(t, 0)
	b.wantOneEffectEach(t, 5)
}
