package main

import (
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// bare publishes n messages as the relay does (persistent, mandatory, confirmed),
// out of memory and with nothing else, and returns messages per second. It is what
// amqp091-go and the broker can do.
func bare(amqpURL, exchange, routingKey string, n, keys, channels, window int) (float64, error) {
	conn, err := amqp.Dial(amqpURL)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	body := payload(payloadBytes)
	errs := make(chan error, channels)
	began := time.Now()
	for c := range channels {
		go func() { errs <- bareChannel(conn, exchange, routingKey, c, n, keys, channels, window, body) }()
	}
	var all error
	for range channels {
		all = errors.Join(all, <-errs)
	}
	return float64(n) / time.Since(began).Seconds(), all
}

func bareChannel(conn *amqp.Connection, exchange, routingKey string, c, n, keys, channels, window int, body []byte) error {
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	defer ch.Close()
	if err := ch.Confirm(false); err != nil {
		return err
	}
	returns := ch.NotifyReturn(make(chan amqp.Return, window+1))
	inFlight := make(chan *amqp.DeferredConfirmation, window)
	slots := make(chan struct{}, window)
	done := make(chan error, 1)
	go func() {
		var failed error
		for confirm := range inFlight {
			if !confirm.Wait() && failed == nil {
				failed = errors.New("bare publishing: not confirmed")
			}
			<-slots
			select {
			case ret := <-returns:
				failed = fmt.Errorf("bare publishing: returned: %s", ret.ReplyText)
			default:
			}
		}
		done <- failed
	}()
	for i := c; i < n; i += channels {
		slots <- struct{}{}
		now := time.Now()
		headers := amqp.Table{"traceparent": traceparent, "outbox-created-at": now.UTC().Format("2006-01-02T15:04:05.000000Z07:00")}
		if keys > 0 {
			headers["outbox-key"] = fmt.Sprintf("key-%d", i%keys)
		}
		confirm, err := ch.PublishWithDeferredConfirm(exchange, routingKey, true, false, amqp.Publishing{
			Headers: headers, ContentType: "application/json", DeliveryMode: amqp.Persistent,
			MessageId: fmt.Sprintf("4bf92f35-77b3-4da6-a3ce-%012d", i), Timestamp: now, Type: "bench", Body: body,
		})
		if err != nil {
			close(inFlight)
			return errors.Join(err, <-done)
		}
		inFlight <- confirm
	}
	close(inFlight)
	return <-done
}
